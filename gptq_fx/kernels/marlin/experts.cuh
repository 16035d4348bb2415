// What the kernels of experts share.

// ids[at], int32 or (wide) int64; -1 where it is none of so many experts.
DEVICE int expert_at(const void* ids, int wide, int at, int experts) {
    const int e = wide ? int(static_cast<const long long*>(ids)[at]) : static_cast<const int*>(ids)[at];
    return e >= 0 && e < experts ? e : -1;
}

// What stands between the two products of an expert. The numbers are those of routes.ACTIVATIONS.

constexpr int SILU = 0, GELU_TANH = 1, GPT_OSS = 2;

DEVICE float activate(float gate, float up, int kind) {
    if (kind == GELU_TANH) {
        const float inner = 0.7978845608028654f * (gate + 0.044715f * gate * gate * gate);
        return 0.5f * gate * (1 + tanhf(inner)) * up;
    }
    float rate = 1;
    if (kind == GPT_OSS) {
        gate = fminf(gate, 7.0f);
        up = fminf(fmaxf(up, -7.0f), 7.0f) + 1;
        rate = 1.702f;
    }
    return gate / (1 + expf(-rate * gate)) * up;
}

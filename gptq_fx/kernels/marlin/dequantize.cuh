// From codes to pairs of 16-bit floats, exactly: the code is written into the mantissa of a power of two, and
// the power, with the zero point, subtracted.
//   fp16 keeps 10 bits: 1024 + q for q < 1024.   bf16 keeps 7: 128 + q for q < 128.
// A bf16 of 8 bits takes q in two parts: 128 + (q mod 128), less 128 where q >= 128, else less 256. Both are
// bit patterns that one logic operation makes, and the difference is q - 128.

constexpr u32 MAGIC = BF16 ? 0x43004300u : 0x64006400u;  // 128 or 1024, twice
constexpr u32 ONE = BF16 ? 0x3f803f80u : 0x3c003c00u;
constexpr u32 MINUS_ONE = ONE | 0x80008000u;
constexpr u32 MINUS_NOTHING = 0x80008000u;

// A number in a register: an instruction has room for one constant, and the compiler would write it anew for
// each. Of threadIdx.z it does not know that it is 0.
DEVICE u32 in_register(u32 constant) { return constant + threadIdx.z; }

DEVICE u32 subtract2(u32 a, u32 b) { return fma2(b, MINUS_ONE, a); }
DEVICE u32 multiply2(u32 a, u32 b) { return fma2(a, b, MINUS_NOTHING); }

// What is subtracted for the outputs g and g + 8 of a block of 16: twice the same number in each.
struct Zero { u32 low, high; };

// The zero points of block w, from the packed words of a lane (layout.py).
DEVICE Zero zero_of(const u32 (&packed)[BITS / 4], int w) {
#if !ASYM
    const u32 middle = BITS == 4 ? MAGIC + 0x00080008u : 0x64806480u;
    return {middle, middle};  // 8 bits in bf16: already subtracted
#elif BITS == 4
    const u32 pair = ((packed[0] >> (4 * w)) & 0x000f000fu) | MAGIC;
    return {bytes<0x1010>(pair), bytes<0x3232>(pair)};
#else
    const u32 pair = (packed[w / 2] >> (8 * (w % 2))) & 0x00ff00ffu;
#if BF16
    const u32 z = subtract2((pair & 0x007f007fu) | MAGIC, (~pair & 0x00800080u) | MAGIC);  // z - 128
#else
    const u32 z = pair | MAGIC;
#endif
    return {bytes<0x1010>(z), bytes<0x3232>(z)};
#endif
}

// The registers of operand a of mma: (g, k), (g + 8, k), (g, k + 8), (g + 8, k + 8), less the zero points.
// magic: MAGIC, in a register.
#if BITS == 4
DEVICE void dequantize(u32 (&a)[4], const u32* word, const Zero& z, u32 magic) {
    const u32 q = word[0];
#if BF16
    a[0] = subtract2((q & 0x000f000fu) | magic, z.low);
    a[2] = subtract2(((q >> 4) & 0x000f000fu) | magic, z.low);
    a[1] = subtract2(((q >> 8) & 0x000f000fu) | magic, z.high);
    a[3] = subtract2(((q >> 12) & 0x000f000fu) | magic, z.high);
#else
    // 1024 + 16 q costs no shift: (1024 + 16 q) / 16 - (64 + z)
    const u32 r = q >> 8;
    const u32 SIXTEENTH = 0x2c002c00u, C960 = 0x63806380u;
    a[0] = subtract2((q & 0x000f000fu) | magic, z.low);
    a[1] = subtract2((r & 0x000f000fu) | magic, z.high);
    a[2] = fma2((q & 0x00f000f0u) | magic, SIXTEENTH, subtract2(C960, z.low));
    a[3] = fma2((r & 0x00f000f0u) | magic, SIXTEENTH, subtract2(C960, z.high));
#endif
}
#else
DEVICE u32 from_bytes(u32 q, u32 z, u32 magic) {
#if BF16
    const u32 v = subtract2((q & 0x007f007fu) | magic, (~q & 0x00800080u) | magic);
    return ASYM ? subtract2(v, z) : v;
#else
    return subtract2((q & 0x00ff00ffu) | magic, z);
#endif
}
DEVICE void dequantize(u32 (&a)[4], const u32* word, const Zero& z, u32 magic) {
    a[0] = from_bytes(word[0], z.low, magic);
    a[1] = from_bytes(word[1], z.high, magic);
    a[2] = from_bytes(word[0] >> 8, z.low, magic);
    a[3] = from_bytes(word[1] >> 8, z.high, magic);
}
#endif

// The same registers in fewer instructions: numbers `raw` of which q = raw * RAW_UNIT - RAW_OFFSET.
//   bf16: 128 + q, and for 8 bits q - 128.   fp16: q * 2^-24, which is the code itself read as a float.
constexpr float RAW_UNIT = BF16 ? 1.0f : 16777216.0f;
constexpr float RAW_OFFSET = !BF16 ? 0 : BITS == 4 ? 128 : -128;
constexpr u32 RAW_MAGIC = BF16 ? MAGIC : 0;

// magic: RAW_MAGIC, in a register.
#if BITS == 4
DEVICE void raw(u32 (&a)[4], const u32* word, u32 magic) {
    const u32 q = word[0];
    a[0] = (q & 0x000f000fu) | magic;
    a[2] = ((q >> 4) & 0x000f000fu) | magic;
    a[1] = ((q >> 8) & 0x000f000fu) | magic;
    a[3] = ((q >> 12) & 0x000f000fu) | magic;
}
#else
DEVICE u32 raw_of_bytes(u32 q, u32 magic) {
#if BF16
    return subtract2((q & 0x007f007fu) | magic, (~q & 0x00800080u) | magic);
#else
    return q & 0x00ff00ffu;
#endif
}
DEVICE void raw(u32 (&a)[4], const u32* word, u32 magic) {
    a[0] = raw_of_bytes(word[0], magic);
    a[1] = raw_of_bytes(word[1], magic);
    a[2] = raw_of_bytes(word[0] >> 8, magic);
    a[3] = raw_of_bytes(word[1] >> 8, magic);
}
#endif

// What the sum of raw * x is less than that of (q - zero) * x, for each x, in units of RAW_UNIT: of block w,
// and its outputs g (r = 0) or g + 8. packed: as for zero_of.
DEVICE float raw_zero(const u32 (&packed)[BITS / 4], int w, int r) {
#if !ASYM
    return (RAW_OFFSET + (1 << (BITS - 1))) / RAW_UNIT;
#else
    const u32 zero = (BITS == 4 ? packed[0] >> (4 * w) : packed[w / 2 % (BITS / 4)] >> (8 * (w % 2))) >> (16 * r);
    return (RAW_OFFSET + float(zero & ((1 << BITS) - 1))) / RAW_UNIT;
#endif
}

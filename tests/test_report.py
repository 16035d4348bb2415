"""The report: a table for people, plain data for machines."""

import json

import expecttest
import pytest
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

import gptq_fx
from gptq_fx import GPTQConfig, Report, Scheme, SiteRecord
from gptq_fx.kernels import LinearSpec
from gptq_fx.report import canonical_bytes


def record(name, kind="linear", scheme=None, kernel="cpu_int4", reason="", shape=(1024, 1024), error=0.125):
    """A made-up weight of 2 bytes a number: dense, or quantized to codes without scales."""
    dense = 2 * shape[0] * shape[1]
    done = scheme is not None
    return SiteRecord(
        name=name,
        kind=kind,
        scheme=scheme,
        kernel=kernel if done else None,
        reason=reason,
        shape=shape,
        dense_bytes=dense,
        bytes=dense * scheme.bits // 16 if done else dense,
        quantized=done,
        error=error if done else None,
    )


def layers(*numbers, error=0.125, **fields):
    return [record(f"layers.{i}.up", scheme=Scheme(), error=error, **fields) for i in numbers]


def table(report):
    """The text in ASCII, which is what expecttest writes."""
    lines = [line.rstrip().replace("─", "-") for line in str(report).splitlines()]
    return "\n".join(lines).strip("\n")


class TestTable(expecttest.TestCase):
    def test_a_small_report(self):
        report = Report(
            [
                *(record(f"h.{i}.up", scheme=Scheme()) for i in range(3)),
                record("h.3.up", scheme=Scheme(8, -1), kernel="slow", reason="8 bits"),
                record("lm_head", "lm_head", reason="skipped"),
            ],
            unused_rules=["'up' -> leave dense"],
            notes=["a note"],
        )
        self.assertExpectedInline(
            table(report),
            """\
 site          kind      shape         scheme              kernel      error      bytes   of dense   why
 -----------------------------------------------------------------------------------------------------------
 h.{0..2}.up   linear    1024 x 1024   W4A16 g128 sym      cpu_int4   0.1250   1.50 MiB      0.250
 h.3.up        linear    1024 x 1024   W8A16 channel sym   slow       0.1250   1.00 MiB      0.500   8 bits
 lm_head       lm_head   1024 x 1024   dense                                   2.00 MiB              skipped


4 of 5 weights quantized: 8.00 MiB dense, 2.50 MiB stored, 0.312 of dense
unused rule: 'up' -> leave dense
a note""",
        )

    def test_an_empty_report(self):
        self.assertExpectedInline(
            table(Report()),
            """\
 site   kind   shape   scheme   kernel   error   bytes   of dense   why
 ----------------------------------------------------------------------


0 of 0 weights quantized: 0.00 MiB dense, 0.00 MiB stored""",
        )


def rows(report):
    """The first column of the table."""
    lines = [line.rstrip() for line in str(report).splitlines()]
    rule = next(i for i, line in enumerate(lines) if "───" in line)
    body = lines[rule + 1 :]
    return [line.split()[0] for line in body[: body.index("")] if line[1:2] != " "]


def test_layers_that_differ_only_in_their_number_share_a_row():
    assert rows(Report(layers(0, 1, 2, 10))) == ["layers.{0,1,2,10}.up"]
    assert rows(Report(layers(*range(12)))) == ["layers.{0..11}.up"]
    assert rows(Report([*layers(0, 2), *layers(1, reason="other")])) == ["layers.{0,2}.up", "layers.1.up"]


def test_a_long_reason_does_not_break_names() -> None:
    names = ["model.language_model.layers.0.self_attn.q_proj", "lm_head"]
    assert rows(Report([record(names[0], scheme=Scheme()), record(names[1], reason="why " * 40)])) == names


def test_a_shared_row_shows_the_largest_error_and_all_bytes():
    text = str(Report([*layers(0, error=0.1), *layers(1, error=0.3)]))
    assert "0.3000" in text
    assert "0.1000" not in text
    assert "1.00 MiB" in text  # of 4 MiB dense


def test_no_row_hides_another():
    """Two weights of one path (a tied table and its projection), and groups that interleave."""
    one_path = [record("wte", "embedding", reason="a"), record("wte", "lm_head", reason="b")]
    assert rows(Report(one_path)) == ["wte", "wte"]
    cross = [record(f"l.{i}.e.{j}", scheme=Scheme(), reason="ab"[i == j]) for i in (0, 1) for j in (0, 1)]
    assert len(rows(Report(cross))) == 2


def test_to_dict_is_json():
    report = Report(
        [*layers(0), record("lm_head", "lm_head", reason="skipped")], ["'up' -> leave dense"], ["n"]
    )
    plain = json.loads(json.dumps(report.to_dict()))
    assert plain["unused_rules"] == ["'up' -> leave dense"]
    assert plain["notes"] == ["n"]
    assert plain["sites"][0]["scheme"] == {"bits": 4, "group_size": 128, "sym": True, "desc_act": False}
    assert plain["sites"][0]["shape"] == [1024, 1024]
    assert plain["sites"][1]["scheme"] is None


def test_to_dict_of_a_real_report_is_json():
    model = nn.Sequential(nn.Embedding(8, 64), nn.Linear(64, 64))
    for report in (
        gptq_fx.explain(model, torch.tensor([1]), config=GPTQConfig(group_size=32)),
        gptq_fx.quantize(model, GPTQConfig(group_size=32), progress=False),
    ):
        names = {site["name"] for site in json.loads(json.dumps(report.to_dict()))["sites"]}
        assert names == {"0", "1"}


@pytest.mark.parametrize(
    "make", [lambda: nn.Linear(64, 96), lambda: Conv1D(96, 64)], ids=["linear", "Conv1D"]
)
@pytest.mark.parametrize("size", [32, -1])
@pytest.mark.parametrize("sym", [True, False], ids=["sym", "asym"])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_bytes_are_told_right_before_quantizing(make, size, sym, bits):
    model = nn.Sequential(make())
    config = GPTQConfig(bits=bits, group_size=size, sym=sym)
    expected = canonical_bytes(LinearSpec(64, 96, config.scheme, torch.float32, "cpu"))
    gptq_fx.quantize(model, config, progress=False)
    assert model[0].weight.nbytes == expected

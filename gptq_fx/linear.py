"""A linear of the model, as calibration finds it and leaves it."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from gptq_fx.decide import Decision
from gptq_fx.parallel import gathered
from gptq_fx.parameter import QuantizedParameter
from gptq_fx.scheme import Scheme
from gptq_fx.split import Split
from gptq_fx.weight import QuantizedWeight


@dataclass(frozen=True)
class Measured:
    """What calibration says of one weight.

    loss: ||X (W - Wq)^T||^2 / ||X W^T||^2 over the calibration tokens, the relative error of the output.
    tokens: how many inputs it saw, all experts of a stack together. damp: the damp_percent it took.
    seconds: its part of solving its stage.
    """

    loss: float
    tokens: int
    damp: float
    seconds: float


@dataclass(frozen=True)
class Quantized:
    """A weight after GPTQ, or the part of it that this rank holds, and the scheme of that.

    error: ||W - Wq|| / ||W|| of the whole. note: what the report should say of it.
    """

    weight: QuantizedWeight
    scheme: Scheme
    error: float
    measured: Measured
    note: str = ""


@dataclass(eq=False)
class Linear:
    """A weight of the model that is, or (refused) could be taken for, a linear's. name: of its site.

    split: what the parameter is a part of, where ranks share the weight.
    """

    parameter: Tensor
    name: str
    kind: str
    transposed: bool
    decision: Decision
    refused: bool = False
    quantized: Quantized | None = None
    split: Split | None = None

    @property
    def scheme(self) -> Scheme | None:
        return self.decision.scheme

    @property
    def waiting(self) -> bool:
        """Whether it is to be quantized, and is not yet."""
        dense = not isinstance(self.parameter, QuantizedParameter)
        return dense and self.scheme is not None and self.quantized is None

    @property
    def whole(self) -> Tensor:
        """The parameter, or the DTensor that it is a part of."""
        return self.parameter if self.split is None else self.split.weight

    @property
    def shape(self) -> tuple[int, ...]:
        """[N, K], or [E, N, K]"""
        *experts, N, K = self.whole.shape
        return (*experts, K, N) if self.transposed else (*experts, N, K)

    def dense(self) -> Tensor:
        """[N, K], or [E, N, K]. Of a split weight all its ranks must ask together."""
        weight = gathered(self.whole)
        return weight.mT if self.transposed else weight

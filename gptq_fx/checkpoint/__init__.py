"""Standard GPTQ checkpoints: read and written."""

from gptq_fx.checkpoint.read import from_pretrained
from gptq_fx.checkpoint.write import SaveReport, save_pretrained

__all__ = ["SaveReport", "from_pretrained", "save_pretrained"]

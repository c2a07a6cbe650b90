"""The small student's text table: rows of words, learnt with the model, row 0 the padding that stays zero.

The runtime reads the same table in numpy (`cfrt.text.TableText`); this module exists to train it."""

from __future__ import annotations

from torch import Tensor, nn

from cfrt.config import TextConfig


class TextTable(nn.Module):
    """Embedding of table rows: ids [..., L] -> [..., L, width]."""

    def __init__(self, config: TextConfig, rows: int) -> None:
        super().__init__()
        self.table = nn.Parameter(nn.init.normal_(nn.Embedding(rows, config.width).weight.detach()))
        self.table.data[0] = 0

    def forward(self, ids: Tensor) -> Tensor:
        return nn.functional.embedding(ids, self.table) * (ids > 0)[..., None]

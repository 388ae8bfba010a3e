"""The filter step: which normalized documents are dropped, and why."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from data_tools.documents import Corpus, drop_path
from data_tools.recipe import FilterConfig
from data_tools.steps import Progress, Step, Tally
from data_tools.text.filter_code import CodeFilter
from data_tools.text.filter_prose import ProseFilter
from megatron_lite.atomic import write_array


@dataclass
class FilterStep(Step):
    """One task per shard; writes the dropped rows and counts by reason and source."""

    settings: FilterConfig
    normalized: Path

    def tasks(self) -> int:
        """One per shard."""
        return len(Corpus(self.normalized).shards())

    def run_task(self, rank: int, progress: Progress) -> None:
        """Filter the documents of shard `rank`."""
        prose = ProseFilter(self.settings.prose, languages=self.settings.languages)
        code = CodeFilter(self.settings.code)
        tally = Tally(self.settings.examples)
        dropped = []
        for row, document in Corpus(self.normalized).read(rank):
            size = len(document.text.encode())
            reason = (
                code.reason(document.text)
                if document.kind == "code"
                else prose.reason(document.text, document.language)
            )
            tally.count(document.source, size, reason)
            tally.example(reason or "kept", document.id, document.text)
            if reason:
                dropped.append(row)
            progress.add(size)
        write_array(drop_path(self.folder, rank), np.array(dropped, np.int64))
        tally.save(self.folder, rank)

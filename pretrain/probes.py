"""What a proof looks at: fixed Chinese sentences, and a batch of the run's own data.

SENTENCES --the checkpoint's tokenizer--> tokens_BT          (random ids without a tokenizer)
the corpora's measured rows --first micro-batch--> Recorded
"""

import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch

from configs.grown import said
from configs.model import ModelConfig, longest_row
from pretrain.lines import plain
from pretrain.state import seed_of

PROBE_ROWS, PROBE_TOKENS = 4, 64
RECORDED_TOKENS = 2048
"""Of a batch of data at most so many, one row at least: what a proof computes in float64 on the CPU
must not depend on how much a device trains on at a time."""
LONGEST_ROW = 4096
"""Of a batch of data: a head's scores are a square, in float64 and held twice 0.27 GB."""
SENTENCES = (
    "北京是中华人民共和国的首都，也是全国的政治中心和文化中心。",
    "床前明月光，疑是地上霜。举头望明月，低头思故乡。",
    "机器学习研究的是怎样让计算机从数据中学到规律，而不必逐条写出规则。",
    "今天下午三点，我们在图书馆二楼的会议室开会，请大家准时参加。",
    "长江全长约6300公里，发源于青藏高原，最后注入东海。",
    "他说：“明天要是下雨，比赛就改到星期六。”大家都点头同意。",
    "水在标准大气压下，加热到100摄氏度就会沸腾，变成水蒸气。",
    "这家公司去年的营业收入同比增长了12.5%，净利润却略有下降。",
    "把大象装进冰箱需要几步？第一步，打开冰箱门。",
    "春节是中国最重要的传统节日，家家户户贴春联、包饺子、放鞭炮。",
    "如果一个三角形的三条边相等，那么它的三个角也相等。",
    "患者三天前开始发热，伴有咳嗽，体温最高达到39.2℃。",
    "自然语言处理的预训练模型在阅读理解、摘要和翻译上都有很好的表现。",
    "小明有五个苹果，给了妹妹两个，又从妈妈那里得到四个，现在有七个。",
    "The quick brown fox jumps over the lazy dog，这句话包含全部英文字母。",
    "海上生明月，天涯共此时。情人怨遥夜，竟夕起相思。",
)


class ProofError(ValueError):
    """A proof cannot be run on these probes; the message says why."""


def probes(tokenizer: Path | None, config: ModelConfig, seed: int = 0) -> torch.Tensor:
    """Probe tokens_BT: the fixed sentences in the checkpoint's own tokens, or seeded random ids.

    Raises ProofError if the tokenizer has tokens that the model has no row for.
    """
    length = min(PROBE_TOKENS, longest_row(config) or PROBE_TOKENS)
    wanted = PROBE_ROWS * length
    if tokenizer is None:
        generator = torch.Generator().manual_seed(seed_of(seed, "probes"))
        ids = torch.randint(said(config), (wanted,), generator=generator)
        return ids.view(PROBE_ROWS, length)
    from data_pipeline.tokenizer import load

    words = load(tokenizer)
    if words.vocab_size > config.vocab:
        raise ProofError(
            f"{tokenizer}: has {words.vocab_size} tokens, model.vocab is {config.vocab}; this "
            "tokenizer does not belong to the model (分词器与模型不符)"
        )
    stream: list[int] = []
    for encoded in words.encode_batch(list(SENTENCES)):
        stream += [*(int(i) for i in encoded), words.eod_id]
    ids = torch.tensor((stream * (wanted // len(stream) + 1))[:wanted])
    return ids.view(PROBE_ROWS, length)


@dataclass(frozen=True)
class Recorded:
    """A batch of data, the objective that gives its loss, and words for which batch it is."""

    batch: Any
    objective: Any
    about: dict[str, Any]


class _Measured(Protocol):
    def validation(self, count: int, data_rank: int, data_size: int, micro: int) -> Iterator[Any]:
        """The measured rows in micro-batches (pretrain.corpora.Corpora)."""
        ...


def recorded(corpora: _Measured, objective: Any, rows: int) -> Recorded | str:
    """The first `rows` measured rows of the validation data, or as many as are RECORDED_TOKENS,
    always the same ones; or why there are none: rows too long for one rank."""
    one = next(iter(corpora.validation(1, 0, 1, 1)))
    sides = [side for side in (one.tokens_BT, one.encoder_tokens_BT) if side is not None]
    length = max(side.shape[1] for side in sides)
    if length > LONGEST_ROW:
        return (
            f"a row has {length} tokens, above {LONGEST_ROW} its attention in float64 is too much "
            "for one rank's memory (行过长，未比较数据损失)"
        )
    rows = min(rows, max(1, RECORDED_TOKENS // length))
    batch = next(iter(corpora.validation(rows, 0, 1, rows)))
    digest = hashlib.sha256(batch.tokens_BT.contiguous().numpy().tobytes()).hexdigest()
    about = {"of": "validation rows", "rows": batch.tokens_BT.shape[0], "tokens_sha256": digest}
    return Recorded(batch, objective, about)


def write_proof(folder: Path, proof: dict[str, Any]) -> Path:
    """Write proof.json into `folder`; returns its path."""
    path = folder / "proof.json"
    path.write_text(json.dumps(plain(proof), ensure_ascii=False, indent=1) + "\n", "utf-8")
    return path

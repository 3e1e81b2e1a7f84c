"""Bad input: one sentence, at once, that names what is wrong; and the model is left as found."""

import io
import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from backends import BACKENDS
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.data import DataLoader, TensorDataset

import greedyprune
from greedyprune import Loss

each_backend = pytest.mark.parametrize("backend", BACKENDS, indirect=True)
Data = Callable[[Tensor, Tensor], object]
pytestmark = pytest.mark.usefixtures("one_thread")


class Net(nn.Module):
    """Five inputs, twelve units, three outputs; counts its forward passes."""

    def __init__(
        self, between: Callable[[Tensor], Tensor] = functional.relu, fan_in: int = 12
    ) -> None:
        super().__init__()
        self.hidden, self.act, self.out = nn.Linear(5, 12), nn.Tanh(), nn.Linear(fan_in, 3)
        self.between, self.calls = between, []

    def forward(self, x: Tensor) -> Tensor:
        if not torch.compiler.is_compiling():  # torch.export traces, which is not work
            self.calls.append(len(x))
        return self.out(self.act(self.between(self.hidden(x))))


def problem(loss: str = "mse") -> tuple[Net, Tensor, Tensor]:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        x = torch.randn(60, 5)
        y = {
            "mse": torch.randn(60, 3),
            "cross_entropy": torch.randint(0, 3, (60,)),
            "bce_with_logits": torch.randint(0, 2, (60, 3)).float(),
        }[loss]
        return Net(), x, y


def batches(x: Tensor, y: Tensor) -> list[tuple[Tensor, Tensor]]:
    return list(zip(x.split(3), y.split(3), strict=True))


def fingerprint(model: nn.Module) -> list[str]:
    """What select must leave alone, bad input or not."""
    hooks = [name for name in vars(nn.Module()) if "hooks" in name]
    state: list = [torch.get_rng_state().tolist(), torch.is_grad_enabled(), torch.get_num_threads()]
    for name, module in model.named_modules():
        state.append((name, module.training, sorted(vars(module))))
        state.append([list(getattr(module, hook) or ()) for hook in hooks])
    for name, p in [*model.named_parameters(), *model.named_buffers()]:
        state.append((name, id(p), p.requires_grad, p.grad is None, p.tolist()))
    return [repr(item) for item in state]


def check_message(error: Exception, *named: str) -> None:
    message = str(error)
    assert len(message.strip().splitlines()) == 1, f"not one sentence: {message}"
    for pattern in named:
        assert re.search(pattern, message), f"{pattern!r} is not named in: {message}"


def refused(model: nn.Module, data: object, *named: str, forwards: int = 99, **options) -> None:
    """Select refuses, names everything it should, soon, and has changed nothing."""
    before = fingerprint(model)
    with pytest.raises((ValueError, TypeError)) as caught:
        greedyprune.select(model, data, progress=False, **options)
    check_message(caught.value, *named)
    assert fingerprint(model) == before
    if isinstance(model, Net):
        assert len(model.calls) <= forwards, "refused only after long work"


# ---------------------------------------------------------------- arguments

NAN, INF = float("nan"), float("inf")
ARGUMENTS: list[tuple[dict, list[str]]] = [
    ({"size": 0}, ["size", r"\b0\b"]),
    ({"size": -1}, ["size", "-1"]),
    ({"size": 13}, ["size", "13", "12"]),
    ({"size": 0.0}, ["size", r"0\.0"]),
    ({"size": 1.5}, ["size", r"1\.5"]),
    ({"size": -0.5}, ["size", r"-0\.5"]),
    ({"size": NAN}, ["size", "nan"]),
    ({"size": INF}, ["size", "inf"]),
    ({"size": "half"}, ["size", "half|str"]),
    ({"size": {"hidden": 13}}, ["size", "hidden", "13", "12"]),
    ({"size": {"nope": 3}}, ["size", "nope"]),
    ({"steps": 0}, ["steps", r"\b0\b"]),
    ({"steps": -2}, ["steps", "-2"]),
    ({"steps": 2.5}, ["steps", r"2\.5|float"]),
    ({"steps": "many"}, ["steps", "many|str"]),
    ({"steps": 5, "size": 3}, ["steps", "size"]),
    ({"steps": 13, "replacement": False}, ["steps", "13", "12"]),
    ({"tolerance": -0.1}, ["tolerance", r"-0\.1"]),
    ({"tolerance": NAN}, ["tolerance", "nan"]),
    ({"tolerance": INF}, ["tolerance", "inf"]),
    ({"tolerance": "tight"}, ["tolerance", "tight|str"]),
    ({"loss": "hinge"}, ["loss", "hinge", "cross_entropy"]),
    ({"loss": 3}, ["loss", "3|int"]),
    ({"loss": nn.MSELoss(reduction="none")}, ["reduction", "none", "mean", "sum"]),
    ({"loss": nn.BCEWithLogitsLoss(reduction="none")}, ["reduction", "none", "mean", "sum"]),
    ({"mask": "hidden"}, ["mask", "hidden", "dicts"]),
    ({"loss": nn.BCEWithLogitsLoss(pos_weight=torch.ones(2))}, ["pos_weight", "2", "3"]),
    ({"objective": "accuracy"}, ["objective", "accuracy", "imitation"]),
    ({"weights": "mean"}, ["weights", "mean", "refit"]),
    ({"replacement": "maybe"}, ["replacement", "maybe|str"]),
    ({"objective": Loss(candidates=13)}, ["candidates", "hidden", "13", "12"]),
    ({"objective": 3}, ["objective", "3", "imitation"]),
    ({"objective": ["loss"]}, ["objective", "['loss']", "imitation"]),
    ({"memory_limit": 0}, ["memory_limit", r"\b0\b"]),
    ({"memory_limit": -1}, ["memory_limit", "-1"]),
    ({"seed": "lucky"}, ["seed", "lucky|str"]),
    ({"backend": "tpu"}, ["backend", "tpu", "reference"]),
    ({"layers": "nope"}, ["layers", "nope"]),
    ({"layers": ["hidden", "nope"]}, ["layers", "nope"]),
    ({"layers": []}, ["layers"]),
    ({"layers": 3}, ["layers", "3|int"]),
    ({"layers": "act"}, ["act", "Tanh"]),  # no units of its own
    ({"layers": "out"}, [r"\bout\b"]),  # nothing consumes it
    ({"layers": {"nope": "out"}}, ["layers", "nope"]),
    ({"layers": {"hidden": "nope"}}, ["layers", "nope"]),
    ({"layers": {"hidden": "act"}}, ["act", "Tanh"]),
    ({"layers": {"hidden": "hidden"}}, ["hidden", "12", "5"]),  # twelve units, five inputs
]


@pytest.mark.parametrize(("options", "named"), ARGUMENTS, ids=lambda value: str(value)[:50])
def test_arguments(options: dict, named: list[str]) -> None:
    model, x, y = problem()
    refused(model, batches(x, y), *named, forwards=1, **options)


@pytest.mark.parametrize(
    ("loss", "named"),
    [
        (nn.CrossEntropyLoss(weight=torch.ones(4)), ["weight", "4", "3"]),
        (nn.CrossEntropyLoss(reduction="none"), ["reduction", "none", "mean"]),
    ],
    ids=["class_weight", "reduction"],
)
def test_cross_entropy_options(loss: nn.Module, named: list[str]) -> None:
    model, x, y = problem("cross_entropy")
    refused(model, batches(x, y), *named, forwards=1, loss=loss)


@pytest.mark.filterwarnings("ignore:.*slow")
@pytest.mark.parametrize(
    "loss",
    [
        lambda outputs, targets: (outputs - targets) ** 2,
        lambda outputs, targets: "small",
        lambda outputs, targets: None,
    ],
    ids=["vector", "text", "none"],
)
def test_a_callable_loss_gives_one_number(loss: Callable) -> None:
    model, x, y = problem()
    refused(model, batches(x, y), "loss", loss=loss, steps=2)


def test_unknown_argument() -> None:
    model, x, y = problem()
    refused(model, (x, y), "stepz", forwards=0, stepz=3)


@pytest.mark.skipif(torch.cuda.is_available(), reason="asks for CUDA where there is none")
def test_cuda_where_there_is_none() -> None:
    model, x, y = problem()
    refused(model, batches(x, y), "(?i)cuda", "backend", forwards=1, backend="cuda")


# ---------------------------------------------------------------- data

EMPTY: dict[str, Data] = {
    "tensors": lambda x, y: (x[:0], y[:0]),
    "list": lambda x, y: [],
    "generator": lambda x, y: (pair for pair in ()),
    "batch": lambda x, y: [(x[:0], y[:0])],
    "dataset": lambda x, y: TensorDataset(x[:0], y[:0]),
    "loader": lambda x, y: DataLoader(TensorDataset(x[:0], y[:0]), batch_size=4),
}


@pytest.mark.parametrize("form", EMPTY)
def test_empty_data(form: str) -> None:
    model, x, y = problem()
    refused(model, EMPTY[form](x, y), "data", r"empty|\b0\b|no ", forwards=1)


TARGETS = r"data|targets?|labels?"
SHAPES: dict[str, tuple[str, Data, list[str]]] = {
    "fewer_targets": ("mse", lambda x, y: (x, y[:59]), [TARGETS, "60", "59"]),
    "fewer_labels": ("cross_entropy", lambda x, y: (x, y[:59]), [TARGETS, "60", "59"]),
    "fewer_in_a_batch": ("mse", lambda x, y: [(x[:20], y[:19])] * 9, [TARGETS, "20", "19"]),
    "narrow": ("mse", lambda x, y: [(x, y[:, :2])] * 9, [TARGETS, r"\b3\b", r"\b2\b"]),
    "broadcasting": ("mse", lambda x, y: [(x, y[:, :1])] * 9, [TARGETS, r"\b3\b", r"\b1\b"]),
    "flat": ("mse", lambda x, y: [(x, y[:, 0])] * 9, [TARGETS, r"\b3\b", r"\b60\b"]),
    "logistic": ("bce_with_logits", lambda x, y: [(x, y[:, :1])] * 9, [TARGETS, r"\b3\b"]),
    "label_column": ("cross_entropy", lambda x, y: [(x, y[:, None])] * 9, [TARGETS, r"\b1\b"]),
    "float_labels": ("cross_entropy", lambda x, y: [(x, y / 2)] * 9, [TARGETS, "float"]),
    "wide_input": ("mse", lambda x, y: [(torch.ones(60, 7), y)] * 9, ["data|inputs?"]),
}


@each_backend
@pytest.mark.parametrize("case", SHAPES)
def test_mismatched_shapes(case: str, backend: str) -> None:
    loss, spoil, named = SHAPES[case]
    model, x, y = problem(loss)
    refused(model, spoil(x, y), *named, forwards=2, loss=loss, backend=backend)


@each_backend
@pytest.mark.parametrize("label", [3, 7, -1, -100])
@pytest.mark.parametrize("row", [0, 59])
def test_labels_out_of_range(label: int, row: int, backend: str) -> None:
    model, x, y = problem("cross_entropy")
    y[row] = label
    loss = nn.CrossEntropyLoss(ignore_index=2)  # so that -100 is a label like any other
    early = {"forwards": 2} if row == 0 else {}
    named = [TARGETS, str(label), r"\b3\b|\b2\b"]
    refused(model, batches(x, y), *named, loss=loss, backend=backend, **early)


@each_backend
def test_every_label_ignored(backend: str) -> None:
    model, x, y = problem("cross_entropy")
    refused(model, (x, torch.full_like(y, -100)), rf"{TARGETS}|ignore", backend=backend)


@each_backend
@pytest.mark.parametrize("value", [NAN, float("inf"), -float("inf")])
@pytest.mark.parametrize("row", [0, 59])
def test_non_finite_inputs_show_in_the_layer(value: float, row: int, backend: str) -> None:
    model, x, y = problem()
    model.act = nn.LeakyReLU()  # lets infinity through
    x[row, 2] = value
    refused(model, batches(x, y), "hidden", "(?i)nan|inf|finite", backend=backend)


@each_backend
@pytest.mark.parametrize("value", [NAN, float("inf")])
def test_non_finite_targets(value: float, backend: str) -> None:
    model, x, y = problem()
    y[59, 1] = value
    refused(model, batches(x, y), TARGETS, "(?i)nan|inf|finite", backend=backend)


@each_backend
@pytest.mark.parametrize("value", [NAN, float("inf")])
@pytest.mark.parametrize("name", ["hidden.weight", "hidden.bias", "out.weight", "out.bias"])
def test_non_finite_weights_name_the_layer(name: str, value: float, backend: str) -> None:
    model, x, y = problem()
    with torch.no_grad():
        model.get_parameter(name).view(-1)[1] = value
    named = [name.partition(".")[0], "(?i)nan|inf|finite"]
    refused(model, batches(x, y), *named, forwards=2, backend=backend)


NOT_DATA: dict[str, Data] = {
    "number": lambda x, y: 3,
    "none": lambda x, y: None,
    "text": lambda x, y: "train",
    "texts": lambda x, y: ["a", "b"],
    "numbers": lambda x, y: (3, 4),
}


@pytest.mark.parametrize("form", NOT_DATA)
def test_not_data(form: str) -> None:
    model, x, y = problem()
    refused(model, NOT_DATA[form](x, y), TARGETS, forwards=1)


# ---------------------------------------------------------------- models

IN_THE_WAY: dict[str, tuple[Callable[[Tensor], Tensor], int, str]] = {
    "softmax": (lambda h: h.softmax(-1), 12, "softmax"),
    "layer_norm": (lambda h: functional.layer_norm(h, (12,)), 12, "layer_norm"),
    "cumsum": (lambda h: h.cumsum(1), 12, "cumsum"),
    "cat": (lambda h: torch.cat([h, h], 1)[:, :14], 14, "slice"),
    "slice": (lambda h: h[:, :6], 6, "slice"),
    "residual": (lambda h: h + h.sum(1, keepdim=True), 12, "sum"),
    "matmul": (lambda h: h @ torch.ones(12, 12), 12, "matmul|mm|linear"),
}


@pytest.mark.parametrize("case", IN_THE_WAY)
@pytest.mark.parametrize("layers", [None, "hidden"])
def test_the_operation_in_the_way_is_named(case: str, layers: str | None) -> None:
    between, fan_in, named = IN_THE_WAY[case]
    _, x, y = problem()
    refused(Net(between, fan_in), batches(x, y), layers or "", named, forwards=1, layers=layers)


def test_a_residual_stream_has_no_units() -> None:
    class Residual(Net):
        def forward(self, x: Tensor) -> Tensor:
            wide = functional.pad(x, (0, 7))
            return self.out(wide + torch.relu(self.hidden(x)))

    _, x, y = problem()
    refused(Residual(), (x, y), "hidden", "add")


def test_one_linear_has_no_hidden_layer() -> None:
    _, x, y = problem()
    refused(nn.Sequential(nn.Linear(5, 3), nn.ReLU()), (x, y), "(?i)model|layer")


def test_what_cannot_be_traced_asks_for_a_mapping() -> None:
    class Untraceable(Net):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x if x.sum() > 0 else -x)

    _, x, y = problem()
    refused(Untraceable(), batches(x, y), "layers", forwards=1)


@pytest.mark.parametrize("model", [None, "net.pt", lambda x: x, nn.Linear])
def test_not_a_model(model: object) -> None:
    _, x, y = problem()
    with pytest.raises((ValueError, TypeError)) as caught:
        greedyprune.select(model, (x, y))
    check_message(caught.value, "model", "Module")


# ---------------------------------------------------------------- prune and Selection


@pytest.fixture(scope="module")
def selection() -> greedyprune.Selection:
    model, x, y = problem()
    return greedyprune.select(model, (x, y), steps=6, progress=False)


def test_prune_wants_the_model_that_was_selected_on(selection: greedyprune.Selection) -> None:
    narrow = Net()
    narrow.hidden, narrow.out = nn.Linear(5, 8), nn.Linear(8, 3)
    other = nn.Sequential(nn.Linear(5, 12), nn.ReLU(), nn.Linear(12, 3))
    for model, named in ((narrow, ["hidden", "12", "8"]), (other, ["hidden"])):
        before = fingerprint(model)
        with pytest.raises((ValueError, TypeError)) as caught:
            greedyprune.prune(model, selection)
        check_message(caught.value, *named)
        assert fingerprint(model) == before


def test_prune_wants_a_model_and_a_selection(selection: greedyprune.Selection) -> None:
    for arguments, named in (((None, selection), "model"), ((Net(), {"hidden": 3}), "selection")):
        with pytest.raises((ValueError, TypeError)) as caught:
            greedyprune.prune(*arguments)
        check_message(caught.value, named)


@pytest.mark.parametrize("k", [0, -1, 7, 2.5, "3", None])
def test_at_wants_a_step_of_the_path(selection: greedyprune.Selection, k: object) -> None:
    with pytest.raises((ValueError, TypeError)) as caught:
        selection.at(k)
    check_message(caught.value, r"\bk\b", r"\b6\b")


def test_load_refuses_what_is_no_selection(tmp_path: Path) -> None:
    pickled = io.BytesIO()
    torch.save({"order": torch.arange(3)}, pickled)
    for content in (b"", b"not a selection", pickled.getvalue()):
        path = tmp_path / "strange.safetensors"
        path.write_bytes(content)
        with pytest.raises((ValueError, TypeError)) as caught:
            greedyprune.Selection.load(path)
        check_message(caught.value, "strange")

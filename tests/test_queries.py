"""Every query's values and gradients against numbers a pencil can check, and what queries refuse."""

import math
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor, nn

import dit_fast as dit
from dit_fast import queries
from dit_fast.problem import Evaluator

# z = x Wᵀ + b at the end of the run: (1.5, 2.5), (2.5, 3.5), (−0.5, −1.5)
X = torch.tensor([[1.0, 0.0], [0.0, 1.0], [1.0, -1.0]])
W, B = [[1.0, 2.0], [3.0, 4.0]], [0.5, -0.5]
TARGETS = torch.tensor([[1.5, 2.5], [0.5, 3.5], [0.5, 0.5]])


def half_square(output, target):
    return 0.5 * (output - target).square().sum(1)


def evaluator(model, loss=half_square, data=(X, TARGETS), **final):
    """The model on a run of one step of two samples, at whose end its parameters are `final`, in float64."""
    params = {
        n: torch.stack([torch.zeros(p.shape), torch.tensor(final[n.split(".")[-1]])]) for n, p in model.named_parameters()
    }
    trajectory = dit.Trajectory.from_arrays(params, [[0, 1]], 0.5)
    return Evaluator.create(dit.Problem(model, loss, data), trajectory, None, torch.float64)


def linear(*after, weight=W, bias=B, **options):
    layer = nn.Linear(2, len(weight))
    return evaluator(nn.Sequential(layer, *after) if after else layer, weight=weight, bias=bias, **options)


def assert_query(ev, query, values, weight=None, bias=None):
    """Its values [Q], and its gradients weight [Q, O, I] and bias [Q, O], at the end of the run."""
    with ev.session():
        found = queries.values_at(ev, ev.params(1), [query])
        gradients = list(queries.gradients_at(ev, 1, ev.params(1), [query]).values())
        sizes, at_the_end = queries.sizes_and_gradients(ev, [query])
        assert sizes == queries.sizes(ev, [query]) == [len(values)]
    torch.testing.assert_close(list(at_the_end.values()), gradients, rtol=0, atol=0)
    torch.testing.assert_close(found, torch.tensor(values, dtype=torch.float64))
    for gradient, expected in zip(gradients, (weight, bias), strict=True):
        if expected is not None:
            torch.testing.assert_close(gradient, torch.as_tensor(expected, dtype=torch.float64))


def test_loss_is_the_mean_of_the_losses():
    # residuals z − y: (0, 0), (2, 0), (−1, −2)
    weight = [[[0.0, 0.0], [0.0, 0.0]], [[0.0, 2.0], [0.0, 0.0]], [[-1.0, 1.0], [-2.0, 2.0]]]
    bias = [[0.0, 0.0], [2.0, 0.0], [-1.0, -2.0]]
    assert_query(linear(), queries.losses(X, TARGETS), [0.0, 2.0, 2.5], weight, bias)
    mean = [[[-1 / 3, 1.0], [-2 / 3, 2 / 3]]], [[1 / 3, -2 / 3]]
    assert_query(linear(), queries.loss(X, TARGETS), [1.5], *mean)


def test_the_l2_part_is_not_in_a_loss_query():
    ev = linear()
    ev.l2 = ev.problem.l2 = 10.0
    assert_query(ev, queries.loss(X, TARGETS), [1.5], None, [[1 / 3, -2 / 3]])


def test_a_logit_is_an_output_by_its_class_or_its_position():
    second = [2.5, 3.5, -1.5], [[[0.0, 0.0], row] for row in X.tolist()], [[0.0, 1.0]] * 3
    assert_query(linear(), queries.logit(X, 1), *second)
    assert_query(linear(), queries.logit(X, -1), *second)
    assert_query(linear(nn.Unflatten(1, (2, 1))), queries.logit(X, (1, 0)), *second)
    assert_query(linear(), queries.logit(X), [1.5, 2.5, -0.5], [[row, [0.0, 0.0]] for row in X.tolist()], [[1.0, 0.0]] * 3)


@pytest.mark.parametrize("after", [(), (nn.Flatten(0),)], ids=["[n, 1]", "[n]"])
def test_one_output_per_sample_has_the_index_0(after):
    ev = linear(*after, weight=W[:1], bias=B[:1])
    assert_query(ev, queries.logit(X), [1.5, 2.5, -0.5], X[:, None], torch.ones(3, 1))
    p = [1 / (1 + math.exp(-z)) for z in (1.5, 2.5, -0.5)]
    slope = torch.tensor([v * (1 - v) for v in p])
    assert_query(ev, queries.probability(X, 1), p, (slope[:, None] * X)[:, None], slope[:, None])
    assert_query(ev, queries.probability(X, 0), [1 - v for v in p], (-slope[:, None] * X)[:, None], -slope[:, None])
    assert_query(ev, queries.margin(X, torch.tensor([1, 0, 0])), [1.5, -2.5, 0.5], None, [[1.0], [-1.0], [-1.0]])


EIGHTHS = {"weight": [[0.0, 0.0]] * 3, "bias": [math.log(1), math.log(2), math.log(5)]}  # softmax: 1/8, 2/8, 5/8


def test_probability_is_the_softmax():
    bias = [[-2 / 64, 12 / 64, -10 / 64]]  # p_1 (δ_1c − p_c)
    assert_query(linear(**EIGHTHS), queries.probability(X[2:], 1), [2 / 8], [[[g, -g] for g in bias[0]]], bias)
    # two positions of one class each: softmax over the last dimension is 1 everywhere
    assert_query(linear(nn.Unflatten(1, (2, 1))), queries.probability(X, (1, 0)), [1.0] * 3)


def test_margin_is_the_log_odds_of_the_class():
    bias = [[1.0, -2 / 7, -5 / 7], [-1 / 3, -2 / 3, 1.0]]  # δ_yc less the softmax over the other classes
    weight = [[[0.0, g] for g in bias[0]], [[g, -g] for g in bias[1]]]
    query = queries.margin(X[1:], torch.tensor([0, 2]))
    assert_query(linear(**EIGHTHS), query, [math.log(1 / 7), math.log(5 / 3)], weight, bias)


def test_parameter_is_one_element_or_all():
    unit = [[[0.0, 0.0], [1.0, 0.0]]]
    assert_query(linear(), queries.parameter("weight", (1, 0)), [3.0], unit, [[0.0, 0.0]])
    assert_query(linear(), queries.parameter("bias", 1), [-0.5], torch.zeros(1, 2, 2), [[0.0, 1.0]])
    assert_query(linear(), queries.parameter("weight"), [1.0, 2.0, 3.0, 4.0], torch.eye(4).view(4, 2, 2), torch.zeros(4, 2))


class Square(nn.Module):
    def forward(self, z):
        return z.square()


def test_feature_is_the_slope_of_an_output_in_an_input():
    assert_query(linear(), queries.feature(X, 1, 0), [3.0] * 3, [[[0.0, 0.0], [1.0, 0.0]]] * 3, torch.zeros(3, 2))
    # (w·x + b)²: slope 2(w·x + b) w_0; its own gradient 2 w_0 x_0 + 2(w·x + b), 2 w_0 x_1, and 2 w_0
    ev = linear(Square(), weight=W[:1], bias=B[:1])
    assert_query(ev, queries.feature(X[:2], 0, 0), [3.0, 5.0], [[[5.0, 0.0]], [[5.0, 2.0]]], [[2.0], [2.0]])


def test_custom_is_a_function_of_the_model():
    squares = queries.custom(lambda model: model.weight.square().sum())
    assert_query(linear(), squares, [30.0], [[[2.0, 4.0], [6.0, 8.0]]], [[0.0, 0.0]])
    both = queries.custom(lambda model: torch.stack([model.bias.prod(), model(X.double())[0, 1]]))
    assert_query(linear(), both, [-0.25, 2.5], [[[0.0, 0.0]] * 2, [[0.0, 0.0], [1.0, 0.0]]], [[-0.5, 0.5], [0.0, 1.0]])


def test_gradients_are_taken_as_they_are():
    flat = torch.arange(12.0).view(2, 6)
    ev = linear()
    with ev.session():
        block = queries.gradients_at(ev, 1, ev.params(1), [queries.gradients({1: flat}), queries.gradients({1: flat[1]})])
    assert block["weight"].tolist() == [[[0, 1], [2, 3]], [[6, 7], [8, 9]], [[6, 7], [8, 9]]]
    assert block["bias"].tolist() == [[4, 5], [10, 11], [10, 11]]


def test_a_score_by_pencil():
    """One step at rate ½ from θ = 0 with the mean of two: ½·½·⟨q, ∇ℓ_j⟩, and ∇_b ℓ_j = −y_j."""
    ev = linear()
    asked = [queries.gradients({1: [0.0, 0, 0, 0, 1, 10]}), queries.logit(X[:1], 1), queries.parameter("bias")]
    result = dit.score(ev.trajectory, ev.problem, asked, sample_ids=[0, 1], check=False)
    assert result.queries == ["gradients", "logit 1", "bias[0]", "bias[1]"]
    # logit 1 of x = (1, 0): W_10 + b_1; ∇ of the first sample, x = (1, 0), is −y_1 in both
    expected = [[-6.625, -8.875], [-1.25, -0.875], [-0.375, -0.125], [-0.625, -0.875]]
    torch.testing.assert_close(result.scores[0], torch.tensor(expected, dtype=torch.float64))


LABELS = {
    "loss": (queries.loss(X, TARGETS), ["loss"]),
    "losses": (queries.losses(X, TARGETS), ["loss[0]", "loss[1]", "loss[2]"]),
    "logit": (queries.logit(X[:1], (1, 0)), ["logit 1,0"]),
    "probability": (queries.probability(X[:1], 2), ["probability 2"]),
    "margin": (queries.margin(X[:2], [0, 1]), ["margin[0]", "margin[1]"]),
    "parameter": (queries.parameter("a.weight", (0, 1)), ["a.weight[0,1]"]),
    "feature": (queries.feature(X[:1], 1, 0), ["d logit 1 / d x[0]"]),
    "custom": (queries.custom(lambda model: model(X).sum(), name="sum"), ["sum"]),
    "gradients": (queries.gradients({0: torch.zeros(1, 3)}, name="mine"), ["mine"]),
}


@pytest.mark.parametrize("case", LABELS)
def test_labels(case):
    query, labels = LABELS[case]
    assert queries.names([query], [query.size or 1]) == labels


def test_many_queries_are_joined_in_their_order():
    ev = linear()
    asked = queries.as_list((queries.parameter("bias"), queries.loss(X, TARGETS), queries.logit(X[:2], 1)))
    with ev.session():
        assert queries.sizes(ev, asked) == [2, 1, 2]
        assert queries.values_at(ev, ev.params(1), asked).tolist() == [0.5, -0.5, 1.5, 2.5, 3.5]
        gradients = queries.gradients_at(ev, 1, ev.params(1), asked)
        assert gradients["bias"].shape == (5, 2)
        sizes, at_the_end = queries.sizes_and_gradients(ev, asked)
        assert sizes == queries.sizes(ev, asked)
        torch.testing.assert_close(at_the_end, gradients, rtol=0, atol=0)
    assert queries.names(asked, [2, 1, 2]) == ["bias[0]", "bias[1]", "loss", "logit 1[0]", "logit 1[1]"]


CHUNKED = {
    "loss": lambda: queries.loss(X, TARGETS),
    "losses": lambda: queries.losses(X, TARGETS),
    "logit": lambda: queries.logit(X, 1),
    "probability": lambda: queries.probability(X, 0),
    "margin": lambda: queries.margin(X, torch.tensor([0, 0, 1])),
    "feature": lambda: queries.feature(X, 1, 0),
}


@pytest.mark.parametrize("case", CHUNKED)
def test_chunks_change_nothing(case, monkeypatch):
    ev = linear()
    whole = CHUNKED[case]()
    monkeypatch.setattr(queries, "CHUNK", 2)
    parts = CHUNKED[case]()
    assert (len(whole.parts), len(parts.parts)) == (1, 2)
    with ev.session():
        expected = queries.gradients_at(ev, 1, ev.params(1), [whole])
        values = queries.values_at(ev, ev.params(1), [whole])
    assert_query(ev, parts, values.tolist(), *expected.values())


def test_a_query_of_more_rows_than_a_chunk():
    n = queries.CHUNK + 1
    x, y = torch.zeros(n, 2), torch.zeros(n, 2)
    x[-1], y[-1] = X[2], TARGETS[2]
    query = queries.loss({"input": x, "labels": y})
    assert len(query.parts) == 2
    ev = linear()
    # every row but the last is x = 0, y = 0: z = b, loss ½ b·b = ¼
    assert_query(ev, query, [(0.25 * (n - 1) + 2.5) / n], None, [[(0.5 * (n - 1) - 1) / n, (-0.5 * (n - 1) - 2) / n]])


class TenTimesInEval(nn.Module):
    """What dropout and batch normalization do, told apart by a pencil."""

    def __init__(self):
        super().__init__()
        self.linear, self.dropout = nn.Linear(2, 2), nn.Dropout(0.0)

    def forward(self, x):
        return self.dropout(self.linear(x)) * (1 if self.training else 10)


def test_queries_run_in_eval_mode_and_training_in_its_own():
    model = TenTimesInEval().train()
    model.dropout.eval()
    ev = evaluator(model, weight=W, bias=B)
    with ev.session():
        (batch,) = ev.batches(0)
        assert ev.output(ev.params(1), batch).tolist() == [[1.5, 2.5], [2.5, 3.5]]
        assert queries.sizes(ev, [queries.custom(lambda m: torch.ones(1 + 2 * m.training) * m.linear.weight.sum())]) == [1]
        assert queries.values_at(ev, ev.params(1), [queries.logit(X, 1)]).tolist() == [25, 35, -15]
        assert queries.gradients_at(ev, 1, ev.params(1), [queries.logit(X, 1)])["linear.bias"].tolist() == [[0, 10]] * 3
        assert model.training and model.linear.training and not model.dropout.training
    with pytest.raises(ZeroDivisionError), ev.session():
        queries.values_at(ev, ev.params(1), [queries.custom(lambda m: 1 / 0)])
    assert model.training and model.linear.training and not model.dropout.training


@pytest.mark.parametrize("function", [dit.score, dit.leave_one_out])
def test_a_query_without_parameters_scores_0_with_a_warning(function):
    ev = linear()
    asked = [queries.custom(lambda model: torch.ones(2, dtype=torch.float64), name="fixed"), queries.logit(X[:1])]
    with pytest.warns(UserWarning, match="query 'fixed' does not depend on the parameters: its scores are 0"):
        scores = function(ev.trajectory, ev.problem, asked, check=False).scores[0]
    assert scores[:2].tolist() == [[0.0] * 3] * 2 and scores[2, 0] != 0


@dataclass
class Output:
    hidden: Tensor
    logits: Tensor


class Returns(nn.Module):
    """A linear net whose output is wrapped by `wrap`."""

    def __init__(self, wrap):
        super().__init__()
        self.linear, self.wrap = nn.Linear(2, 2), wrap

    def forward(self, x):
        return self.wrap(self.linear(x))


WRAPS = {
    "tuple": (lambda z: (z, z.sum()), lambda output: output[0]),
    "dict": (lambda z: {"hidden": z[None], "logits": z}, lambda output: output["logits"]),
    "object": (lambda z: Output(z[None], z), lambda output: output.logits),
}


@pytest.mark.parametrize("case", WRAPS)
def test_outputs_that_hold_the_logits(case):
    wrap, unwrap = WRAPS[case]
    ev = evaluator(Returns(wrap), lambda output, target: half_square(unwrap(output), target), weight=W, bias=B)
    assert_query(ev, queries.logit(X, 1), [2.5, 3.5, -1.5], None, [[0.0, 1.0]] * 3)
    assert_query(ev, queries.loss(X, TARGETS), [1.5], None, [[1 / 3, -2 / 3]])


CONSTRUCTORS = {
    "rows": (lambda: queries.loss(X, TARGETS[:2]), ValueError, r"same number of rows.*\[\(3, 2\), \(2, 2\)\]"),
    "rows of a dict": (lambda: queries.losses({"x": X, "labels": X[0, 0]}), ValueError, r"same number of rows.*\(3, 2\), \(\)"),
    "empty": (lambda: queries.logit(X[:0]), ValueError, r"at least one; got shapes \[\(0, 2\)\]"),
    "no tensor": (lambda: queries.logit([1.0, 2.0]), TypeError, "inputs must be tensors with the batch dimension in front"),
    "no batch": (lambda: queries.logit(torch.tensor(1.0)), TypeError, "inputs must be tensors with the batch dimension"),
    "margin rows": (lambda: queries.margin(X, torch.tensor([0, 1])), ValueError, r"class numbers \[3\], got shape \(2,\)"),
    "margin matrix": (lambda: queries.margin(X, TARGETS), ValueError, r"class numbers \[3\], got shape \(3, 2\)"),
    "negative class": (lambda: queries.probability(X, -1), ValueError, "index must be 0 or positive, got -1"),
    "integer feature": (lambda: queries.feature(X.long(), 0, 0), TypeError, "feature needs a floating tensor x"),
    "dict feature": (lambda: queries.feature({"x": X}, 0, 0), TypeError, "feature needs a floating tensor x"),
    "no function": (lambda: queries.custom(3), TypeError, r"custom needs a function fn\(model\)"),
    "no gradients": (lambda: queries.gradients({}), ValueError, r"gradients needs \{step: \[Q, P\]\}"),
    "uneven gradients": (lambda: queries.gradients({1: [1.0], 2: [1.0, 2.0]}), ValueError, "same Q and P at every step"),
    "no query": (lambda: queries.as_list(lambda model: 0), TypeError, "query must be one of dit_fast.queries"),
    "empty list": (lambda: queries.as_list([]), TypeError, "query must be one of dit_fast.queries"),
    "mixed list": (lambda: queries.as_list([queries.logit(X), "loss"]), TypeError, "query must be one of dit_fast.queries"),
}


@pytest.mark.parametrize("case", CONSTRUCTORS)
def test_constructors_refuse(case):
    call, error, message = CONSTRUCTORS[case]
    with pytest.raises(error, match=message):
        call()


ONE = {"weight": W[:1], "bias": B[:1]}
CUSTOM = "a custom query must return a floating scalar tensor or a vector"
ASKED = {
    "class": (queries.logit(X, 2), {}, r"index 2 does not name one element of an output of shape \(3, 2\) behind its batch"),
    "negative class": (queries.logit(X, -3), {}, "index -3 does not name one element"),
    "too few indices": (queries.logit(X, ()), {}, r"index \(\) does not name one element"),
    "too many indices": (queries.logit(X, (0, 0)), {}, r"index \(0, 0\) does not name one element"),
    "only output": (queries.logit(X, 1), ONE, r"index 1 does not name one element of an output of shape \(3,\)"),
    "probability": (queries.probability(X, 2), {}, "index 2 does not name one element"),
    "binary probability": (queries.probability(X, 2), ONE, "one output per sample has the classes 0 and 1, not 2"),
    "margin": (queries.margin(X, [0, 1, 2]), {}, r"y must lie in 0\.\.1, the model's classes; got 0\.\.2"),
    "negative margin": (queries.margin(X, [0, 1, -1]), {}, r"y must lie in 0\.\.1, the model's classes; got -1\.\.1"),
    "binary margin": (queries.margin(X, [1, -1, 1]), ONE, r"y must lie in 0\.\.1, the model's classes; got -1\.\.1"),
    "feature": (queries.feature(X, 0, 2), {}, r"index 2 does not name one element of an output of shape \(3, 2\)"),
    "parameter": (queries.parameter("gain"), {}, "query parameter 'gain' is not in the log, which has weight, bias"),
    "parameter index": (queries.parameter("weight", (0, 2)), {}, r"\(0, 2\) is not in parameter 'weight' of shape \(2, 2\)"),
    "number": (queries.custom(lambda model: 1.0), {}, CUSTOM),
    "matrix": (queries.custom(lambda model: model.weight), {}, CUSTOM),
    "integers": (queries.custom(lambda model: torch.ones(2, dtype=torch.int64)), {}, CUSTOM),
    "nothing": (queries.custom(lambda model: model.weight[0, :0]), {}, CUSTOM),
    "wrong P": (queries.gradients({1: torch.zeros(1, 5)}), {}, "has 5 parameters at step 1, the log 6"),
    "missing step": (queries.gradients({0: [0.0] * 6, 7: [0.0] * 6}), {}, r"no gradient for step 1, .*; it has \[0, 7\]"),
}


@pytest.mark.parametrize("case", ASKED)
def test_score_refuses(case):
    query, options, message = ASKED[case]
    ev = linear(**options)
    with pytest.raises(ValueError, match=message):
        dit.score(ev.trajectory, ev.problem, query, check=False)


def test_ready_gradients_cannot_be_retrained():
    ev = linear()
    with pytest.raises(ValueError, match=r"queries.gradients has no value, only gradients: it cannot be retrained"):
        dit.leave_one_out(ev.trajectory, ev.problem, queries.gradients({1: [0.0] * 6}), check=False)


def test_a_margin_needs_classes_and_an_output_needs_logits():
    ev = linear(nn.Unflatten(1, (2, 1)))
    with pytest.raises(ValueError, match=r"margin needs an output \[n, classes\], the model's is \(3, 2, 1\)"), ev.session():
        queries.values_at(ev, ev.params(1), [queries.margin(X, [0, 1, 1])])
    ev = evaluator(Returns(lambda z: {"z": z}), weight=W, bias=B)
    with pytest.raises(TypeError, match=r"the model's output \(dict\) is no tensor and has no logits; use queries.custom"):
        dit.score(ev.trajectory, ev.problem, queries.logit(X), check=False)


def test_a_query_prints_its_label_and_size():
    assert repr(queries.loss(torch.zeros(3, 2), torch.zeros(3))) == "Query('loss', 1 value)"
    assert repr(queries.losses(torch.zeros(3, 2), torch.zeros(3))) == "Query('loss', 3 values)"
    assert repr(queries.custom(lambda model: model.weight.sum())) == "Query('custom', as many values as it gives)"


def test_a_query_that_fails_on_the_model_is_named():
    ev = linear()
    with (
        ev.session(),
        pytest.raises(ValueError, match=r"query 'logit 0' fails on the model, which is asked in float64 on cpu: "),
    ):
        queries.sizes(ev, [queries.logit(torch.randn(2, 5))])


def test_a_query_of_another_model_is_told_to_be_zero():
    ev, other = linear(), nn.Linear(2, 1)
    with ev.session():
        with pytest.warns(UserWarning, match="does not depend on the parameters"):
            queries.sizes(ev, [queries.custom(lambda model: other(X).sum(), "other")])
        assert queries.sizes(ev, [queries.custom(lambda model: model(X.double()).sum(), "own")]) == [1]

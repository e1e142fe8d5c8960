"""The prefix transformer: all prefixes at once, step by step, and a naive network of loops; what it may see.

The references are NumPy in float64, one prefix at a time, so that no prefix can know what follows it.
"""

import math
from collections.abc import Sequence

import numpy as np
import pytest
import torch

from actors.environments.noise import UniformSubstitution
from actors.trajectories import TrajectoryBatch
from learner import exact
from learner.batch import TensorBatch
from learner.dynamics import DynamicsModel
from learner.networks import MLPConfig, TransformerConfig, build_network
from learner.networks.mlp import MAX_AUTO_KMERS, MAX_EMBEDDINGS, PrefixMLP
from learner.networks.prefixes import index_prefixes, join_symbols, num_symbols
from learner.networks.transformer import Block, CausalStream, PrefixTransformer
from learner.policy import Policy
from learner.space import SequenceSpace
from tests.reference import draw_paths, fixed_space, mlp_outputs, prefix_row, randomise, softmax, variable_space

SPACES = [fixed_space(4, 5), fixed_space(2, 1), variable_space(3, 5, 0), variable_space(2, 4, 2)]
LAYERS = [(1, 1), (3, 1), (1, 3)]
"""Blocks of the stream of realised and of the stream of intended tokens."""
OUTPUTS = 5


def config_of(layers: tuple[int, int] = (2, 1), *, thought_context: bool = False, **changes: int) -> TransformerConfig:
    sizes = {"hidden_size": 12, "num_heads": 3, "num_layers": layers[0], "num_thought_layers": layers[1]} | changes
    return TransformerConfig(name="transformer", thought_context=thought_context, **sizes)


def network_of(space: SequenceSpace, config: TransformerConfig, seed: int = 1) -> PrefixTransformer:
    network = build_network(space, OUTPUTS, config)
    assert isinstance(network, PrefixTransformer)
    randomise(network, seed=seed)
    return network


def drawn(space: SequenceSpace, count: int, seed: int = 2) -> TrajectoryBatch:
    return draw_paths(space, UniformSubstitution(0.5).kernel(space.allowed), count, seed)


def symbols_of(space: SequenceSpace, batch: TrajectoryBatch, thought_context: bool) -> torch.Tensor:
    return torch.from_numpy(join_symbols(batch.tokens, batch.actions, space.num_actions, thought_context))


def every_row(symbols: torch.Tensor) -> torch.Tensor:
    return torch.arange(len(symbols) * (symbols.shape[1] + 1))


def all_outputs(network: torch.nn.Module, symbols: torch.Tensor) -> torch.Tensor:
    """[B, T+1, O]."""
    return network(symbols, every_row(symbols)).view(len(symbols), symbols.shape[1] + 1, -1)


def only(parent: int) -> torch.Tensor:
    return torch.tensor([parent])


def stepped(network: torch.nn.Module, symbols: torch.Tensor) -> list[torch.Tensor]:
    """Outputs [O] of all prefixes of one string of symbols, by the cache."""
    state, outputs = network.start(), []
    outputs.append(network.outputs(state)[0])
    for symbol in symbols:
        state = network.extend(state, only(0), symbol[None])
        outputs.append(network.outputs(state)[0])
    return outputs


# --- the naive network ------------------------------------------------------------------------------------------------


def layer_norm(x: np.ndarray, weight: np.ndarray, bias: np.ndarray) -> np.ndarray:
    return (x - x.mean()) / np.sqrt(((x - x.mean()) ** 2).mean() + 1e-5) * weight + bias


def gelu(x: np.ndarray) -> np.ndarray:
    return np.array([0.5 * v * (1 + math.erf(v / math.sqrt(2))) for v in x])


def naive_block(
    weights: dict[str, np.ndarray], prefix: str, x: list[np.ndarray], num_heads: int
) -> tuple[list[np.ndarray], np.ndarray]:
    """One pre-norm block on positions x, and its attention weights [heads, t, t]."""

    def linear(name: str, value: np.ndarray) -> np.ndarray:
        return weights[f"{prefix}{name}.weight"] @ value + weights[f"{prefix}{name}.bias"]

    def norm(name: str, value: np.ndarray) -> np.ndarray:
        return layer_norm(value, weights[f"{prefix}{name}.weight"], weights[f"{prefix}{name}.bias"])

    hidden = len(x[0])
    size = hidden // num_heads
    projected = [linear("qkv", norm("attention_norm", value)) for value in x]
    attention, result = np.zeros((num_heads, len(x), len(x))), []
    for i in range(len(x)):
        heads = []
        for head in range(num_heads):
            part = slice(head * size, (head + 1) * size)
            query = projected[i][:hidden][part]
            scores = np.array([query @ projected[j][hidden : 2 * hidden][part] / math.sqrt(size) for j in range(i + 1)])
            shares = np.exp(scores - scores.max())
            shares /= shares.sum()
            attention[head, i, : i + 1] = shares
            heads.append(sum(shares[j] * projected[j][2 * hidden :][part] for j in range(i + 1)))
        y = x[i] + linear("project", np.concatenate(heads))
        result.append(y + linear("feed_forward.2", gelu(linear("feed_forward.0", norm("feed_forward_norm", y)))))
    return result, attention


def naive_stream(stream: CausalStream, tokens: Sequence[int], num_heads: int) -> tuple[np.ndarray, np.ndarray]:
    """Last layer [H] at the newest position, and the attention weights [L, heads, t+1, t+1]."""
    weights = {name: p.detach().cpu().double().numpy() for name, p in stream.named_parameters()}
    string = [len(weights["embedding"]) - 1, *(int(token) for token in tokens)]  # the last row: the beginning
    x = [weights["embedding"][token] + weights["positions"][i] for i, token in enumerate(string)]
    attention = []
    for number in range(len(stream.blocks)):
        x, shares = naive_block(weights, f"blocks.{number}.", x, num_heads)
        attention.append(shares)
    return layer_norm(x[-1], weights["norm.weight"], weights["norm.bias"]), np.stack(attention)


def naive_outputs(network: PrefixTransformer, tokens: Sequence[int], actions: Sequence[int]) -> np.ndarray:
    """float64 [O] of the prefix `tokens`, with the thoughts `actions` behind it."""
    num_heads = network.streams[0].blocks[0].num_heads
    strings = [tokens, actions][: len(network.streams)]
    pairs = zip(network.streams, strings, strict=True)
    hidden = np.concatenate([naive_stream(stream, string, num_heads)[0] for stream, string in pairs])
    head = network.head
    return head.weight.detach().double().numpy() @ hidden + head.bias.detach().double().numpy()


# --- all prefixes, step by step, naive --------------------------------------------------------------------------------


@pytest.mark.parametrize("thought_context", [False, True], ids=["tokens", "thoughts"])
@pytest.mark.parametrize("layers", LAYERS, ids=str)
@pytest.mark.parametrize("space", SPACES, ids=str)
@torch.no_grad()
def test_forward_and_cache_equal_the_naive_network(
    space: SequenceSpace, layers: tuple[int, int], thought_context: bool
):
    single = network_of(space, config_of(layers, thought_context=thought_context))
    double = network_of(space, config_of(layers, thought_context=thought_context)).double()
    batch = drawn(space, 5)
    symbols = symbols_of(space, batch, thought_context)
    outputs, rough = all_outputs(double, symbols), all_outputs(single, symbols)
    for b in range(len(batch)):
        steps = batch.num_steps[b]
        by_cache, rough_by_cache = stepped(double, symbols[b, :steps]), stepped(single, symbols[b, :steps])
        for t in range(steps + 1):
            expected = naive_outputs(double, batch.tokens[b, :t], batch.actions[b, :t])
            np.testing.assert_allclose(outputs[b, t].numpy(), expected, rtol=1e-9, atol=1e-10)
            np.testing.assert_allclose(by_cache[t].numpy(), expected, rtol=1e-9, atol=1e-10)
            np.testing.assert_allclose(rough[b, t].numpy(), expected, rtol=1e-4, atol=1e-4)
            np.testing.assert_allclose(rough_by_cache[t].numpy(), rough[b, t].numpy(), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("space", SPACES, ids=str)
@torch.no_grad()
def test_the_naive_network_tells_weights_apart(space: SequenceSpace):
    """The comparison above has teeth: every parameter matters at some prefix."""
    config = config_of((2, 2), thought_context=True)
    network, batch = network_of(space, config).double(), drawn(space, 20)
    symbols = symbols_of(space, batch, True)
    before = all_outputs(network, symbols)
    for name, parameter in network.named_parameters():
        kept = parameter.clone()
        parameter += torch.randn(parameter.shape, generator=torch.Generator().manual_seed(3), dtype=parameter.dtype)
        assert (all_outputs(network, symbols) - before).abs().max() > 1e-4, name
        parameter.copy_(kept)


@pytest.mark.parametrize("thought_context", [False, True], ids=["tokens", "thoughts"])
@pytest.mark.parametrize("space", [SPACES[0], SPACES[2]], ids=str)
@torch.no_grad()
def test_rows_are_chosen_as_asked(space: SequenceSpace, thought_context: bool):
    network, batch = network_of(space, config_of(thought_context=thought_context)), drawn(space, 6)
    symbols = symbols_of(space, batch, thought_context)
    rows = torch.from_numpy(np.random.default_rng(0).permutation(len(every_row(symbols)))[:17])
    expected = all_outputs(network, symbols).flatten(0, 1)[rows]
    assert torch.equal(network(symbols, rows), expected)
    assert network(symbols, rows[:0]).shape == (0, OUTPUTS)


@pytest.mark.parametrize("thought_context", [False, True], ids=["tokens", "thoughts"])
@pytest.mark.parametrize("layers", [(1, 1), (3, 3)], ids=str)
@torch.no_grad()
def test_parents_branch_repeat_reorder_and_die(layers: tuple[int, int], thought_context: bool):
    """Each prefix keeps its own past, whichever parents are extended, in whatever order, however often."""
    space = fixed_space(3, 6)
    network = network_of(space, config_of(layers, thought_context=thought_context)).double()
    choices: list[list[int]] = [
        [0, 0, 0, 0],  # branch
        [0, 1, 2, 3],  # one child each
        [3, 2, 1, 0],  # reordered, as many as before
        [2, 2, 0],  # some die, one repeats
        [0, 1, 2, 1, 2, 2, 0],  # more than before
        [1, 2, 3, 4],  # consecutive, but not from the first on
    ]
    rng, size = np.random.default_rng(0), num_symbols(3, thought_context)
    state, strings = network.start(), [()]
    for depth, parents in enumerate(choices):
        symbols = rng.integers(size, size=len(parents))
        if depth == 4:
            symbols[3] = symbols[1]  # the same child of the same parent, twice
        old, before = state, network.outputs(state)
        state = network.extend(state, torch.tensor(parents), torch.from_numpy(symbols))
        strings = [(*strings[p], int(symbol)) for p, symbol in zip(parents, symbols, strict=True)]
        assert (state.depth, len(state)) == (depth + 1, len(parents))
        assert torch.equal(network.outputs(old), before), "extending changed the parents"
        for i, string in enumerate(strings):
            full = all_outputs(network, torch.tensor([string]))[0, -1]
            np.testing.assert_allclose(network.outputs(state)[i].numpy(), full.numpy(), rtol=1e-10, atol=1e-11)


@pytest.mark.parametrize("thought_context", [False, True], ids=["tokens", "thoughts"])
@torch.no_grad()
def test_selected_prefixes_go_on_by_themselves(thought_context: bool):
    space = fixed_space(3, 4)
    network = network_of(space, config_of((2, 2), thought_context=thought_context)).double()
    size = num_symbols(3, thought_context)
    state = network.start()
    for _ in range(2):  # all prefixes of length two
        parents = torch.arange(len(state)).repeat_interleave(size)
        state = network.extend(state, parents, torch.arange(size).repeat(len(state)))
    part = state.select(slice(3, 7))
    assert (len(part), part.depth, part.device) == (4, 2, torch.device("cpu"))
    np.testing.assert_array_equal(network.outputs(part), network.outputs(state)[3:7])
    children, symbols = torch.tensor([3, 0, 0]), torch.tensor([1, 2, 0])
    np.testing.assert_allclose(
        network.outputs(network.extend(part, children, symbols)),
        network.outputs(network.extend(state, children + 3, symbols)),
        rtol=1e-12,
    )
    assert len(state.select(slice(7, 7))) == 0
    assert len(state.select(slice(size**2 - 2, size**2 + 5))) == 2


# --- what may be seen -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("thought_context", [False, True], ids=["tokens", "thoughts"])
@pytest.mark.parametrize("space", [SPACES[0], SPACES[2]], ids=str)
@torch.no_grad()
def test_a_prefix_sees_all_that_is_before_it_and_nothing_after(space: SequenceSpace, thought_context: bool):
    """Change a realised or intended token at position p: the prefixes up to p stay, all the longer ones change.

    So prefix t reads a_0..a_{t-1}, all of them, and neither a_t nor anything later.
    """
    actions, steps = space.num_actions, space.max_length
    network = network_of(space, config_of((2, 2), thought_context=thought_context)).double()
    rng = np.random.default_rng(4)
    tokens, thoughts = rng.integers(actions, size=(2, 8, steps))
    before = all_outputs(network, torch.from_numpy(join_symbols(tokens, thoughts, actions, thought_context)))
    for string in (tokens, thoughts):
        for position in range(steps):
            kept = string[:, position].copy()
            string[:, position] = (kept + rng.integers(1, actions, size=8)) % actions
            after = all_outputs(network, torch.from_numpy(join_symbols(tokens, thoughts, actions, thought_context)))
            string[:, position] = kept
            change = (after - before).abs().amax(-1)
            np.testing.assert_allclose(change[:, : position + 1].numpy(), 0, atol=1e-12)
            if string is tokens or thought_context:
                assert (change[:, position + 1 :] > 1e-8).all(), position
            else:
                assert (change == 0).all(), "without a thought context, intentions are not read"


@torch.no_grad()
def test_a_thought_enters_the_cache_with_its_outcome():
    space = fixed_space(2, 3)
    network = network_of(space, config_of((1, 1), thought_context=True)).double()
    root = network.start()
    symbols = torch.from_numpy(join_symbols(np.array([1, 1, 0]), np.array([0, 1, 0]), 2, True))
    children = network.outputs(network.extend(root, torch.zeros(3, dtype=torch.int64), symbols))
    assert (children[0] - children[1]).abs().max() > 1e-3  # another intention
    assert (children[0] - children[2]).abs().max() > 1e-3  # another outcome
    for i, (token, action) in enumerate([(1, 0), (1, 1), (0, 0)]):
        np.testing.assert_allclose(children[i], naive_outputs(network, [token], [action]), rtol=1e-9)


@torch.no_grad()
def test_swapping_realised_and_intended_tokens_makes_a_difference():
    network = network_of(fixed_space(3, 3), config_of(thought_context=True)).double()
    first, second = np.array([[0, 1, 2]]), np.array([[2, 1, 1]])
    one, other = (
        all_outputs(network, torch.from_numpy(join_symbols(x, a, 3, True)))
        for x, a in ((first, second), (second, first))
    )
    assert (one[:, 1:] - other[:, 1:]).abs().amax(-1).min() > 1e-4


@torch.no_grad()
def test_order_matters():
    network = network_of(fixed_space(2, 3), config_of((1, 1))).double()
    outputs = all_outputs(network, torch.tensor([[0, 1, 1], [1, 0, 1], [1, 1, 0]]))[:, 3]
    assert torch.pdist(outputs).min() > 1e-3


# --- attention --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("thought_context", [False, True], ids=["tokens", "thoughts"])
@torch.no_grad()
def test_attention_weights_are_the_naive_ones(thought_context: bool):
    space = fixed_space(3, 4)
    network = network_of(space, config_of((2, 3), thought_context=thought_context)).double()
    batch = drawn(space, 3)
    maps = network.attention(symbols_of(space, batch, thought_context))
    assert [tuple(m.shape) for m in maps] == [(2, 3, 3, 5, 5), (3, 3, 3, 5, 5)][: 1 + thought_context]
    for stream, weights, strings in zip(network.streams, maps, [batch.tokens, batch.actions], strict=False):
        np.testing.assert_allclose(weights.sum(-1).numpy(), 1, rtol=1e-12)
        assert (weights.triu(1) == 0).all()
        assert (weights.tril() >= 0).all()
        assert weights[..., 0, 0].eq(1).all()
        for b in range(len(batch)):
            np.testing.assert_allclose(weights[:, b].numpy(), naive_stream(stream, strings[b], 3)[1], atol=1e-10)


@torch.no_grad()
def test_the_output_of_a_block_follows_from_its_attention_weights():
    block = Block(12, 3)
    randomise(block, seed=5)
    block.double()
    x = torch.randn(2, 6, 12, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    values = block.qkv(block.attention_norm(x))[..., 24:]
    read = torch.cat(
        [block.attention(x)[:, head] @ values[..., 4 * head : 4 * head + 4] for head in range(3)], -1
    )  # [B, t, H]
    y = x + block.project(read)
    np.testing.assert_allclose(block(x), y + block.feed_forward(block.feed_forward_norm(y)), rtol=1e-10, atol=1e-12)


# --- policies and dynamics on it --------------------------------------------------------------------------------------


@pytest.mark.parametrize("space", SPACES, ids=str)
@pytest.mark.parametrize("thought_context", [False, True], ids=["tokens", "thoughts"])
@torch.no_grad()
def test_untrained_it_is_uniform(space: SequenceSpace, thought_context: bool):
    torch.manual_seed(0)
    config = config_of(thought_context=thought_context)
    policy, dynamics = Policy(space, config, backward_head=True, lookahead_steps=2), DynamicsModel(space, config)
    batch = drawn(space, 10)
    symbols = symbols_of(space, batch, thought_context)
    rows = torch.from_numpy(
        np.concatenate([b * (space.max_length + 1) + np.arange(steps) for b, steps in enumerate(batch.num_steps)])
    )
    outputs, kernels = policy(symbols, rows), dynamics(symbols, rows).exp()
    for i, row in enumerate(rows.tolist()):
        depth = row % (space.max_length + 1)
        uniform = space.allowed[depth] / space.allowed[depth].sum()
        np.testing.assert_allclose(outputs.log_policy[i].exp().numpy(), uniform, atol=1e-6)
        assert float(outputs.log_flow[i]) == pytest.approx(float(space.log_num_completions[depth]), abs=1e-5)
        np.testing.assert_allclose(kernels[i].numpy(), np.tile(uniform, (space.num_actions, 1)), atol=1e-6)
    assert (outputs.backward_logits == 0).all()
    assert (outputs.lookahead_logits == 0).all()


@pytest.mark.parametrize("space", [SPACES[0], SPACES[3]], ids=str)
@pytest.mark.parametrize("thought_context", [False, True], ids=["tokens", "thoughts"])
@torch.no_grad()
def test_policy_and_dynamics_say_the_same_step_by_step(space: SequenceSpace, thought_context: bool):
    config = config_of((1, 2), thought_context=thought_context)
    policy = Policy(space, config, backward_head=True, lookahead_steps=2, own_log_z=True)
    dynamics = DynamicsModel(space, config)
    assert policy.thought_context == dynamics.thought_context == thought_context
    randomise(policy, seed=8)
    randomise(dynamics, seed=9)
    batch, width = drawn(space, 6), space.max_length + 1
    symbols = symbols_of(space, batch, thought_context)
    outputs, kernels = policy(symbols, every_row(symbols)), dynamics(symbols, every_row(symbols))
    for b in range(len(batch)):
        state, dynamics_state = policy.start(), dynamics.start()
        for t in range(batch.num_steps[b]):
            row, at = b * width + t, policy.at(state)
            assert at.backward_logits is not None
            assert at.lookahead_logits is not None
            assert at.lookahead_logits.shape == (1, 2, space.num_actions)
            for ours, theirs in (
                (at.log_policy[0].exp(), outputs.log_policy[row].exp()),
                (at.log_flow[0], outputs.log_flow[row]),
                (at.backward_logits[0], outputs.backward_logits[row]),
                (at.lookahead_logits[0], outputs.lookahead_logits[row]),
                (dynamics.at(dynamics_state)[0].exp(), kernels[row].exp()),
            ):
                np.testing.assert_allclose(ours.numpy(), theirs.numpy(), rtol=1e-4, atol=1e-4)
            assert float(at.log_policy.exp().sum()) == pytest.approx(1, abs=1e-5)
            assert (at.log_policy[0].exp().numpy()[~space.allowed[t]] == 0).all()
            state = policy.extend(state, only(0), symbols[b, t : t + 1])
            dynamics_state = dynamics.extend(dynamics_state, only(0), symbols[b, t : t + 1])


@pytest.mark.parametrize("thought_context", [False, True], ids=["tokens", "thoughts"])
def test_every_parameter_is_trained(thought_context: bool):
    space = variable_space(2, 3, 1)
    policy = Policy(space, config_of((2, 2), thought_context=thought_context), backward_head=True)
    randomise(policy, seed=10)
    batch = drawn(space, 40)
    symbols = symbols_of(space, batch, thought_context)
    outputs = policy(symbols, every_row(symbols))
    assert outputs.backward_logits is not None
    loss = outputs.log_policy.clamp(min=-50)[:, :2].square().sum() + outputs.backward_logits.square().sum()
    (loss + outputs.log_flow.square().sum()).backward()
    for name, parameter in policy.named_parameters():
        assert parameter.grad is not None, name
        assert torch.isfinite(parameter.grad).all(), name
        assert parameter.grad.abs().max() > 0, name


# --- prefixes with thoughts -------------------------------------------------------------------------------------------


def test_symbols_name_pairs():
    tokens, actions = np.meshgrid(np.arange(5, dtype=np.int16), np.arange(5, dtype=np.int16))
    pairs = join_symbols(tokens, actions, 5, True)
    assert pairs.dtype == np.int64
    assert sorted(pairs.ravel()) == list(range(num_symbols(5, True)))
    np.testing.assert_array_equal(pairs // 5, tokens)
    np.testing.assert_array_equal(pairs % 5, actions)
    plain = join_symbols(tokens, actions, 5, False)
    assert plain.dtype == np.int64
    np.testing.assert_array_equal(plain, tokens)
    assert num_symbols(5, False) == 5
    assert join_symbols(np.int16([[299]]), np.int16([[299]]), 300, True) == [[300 * 300 - 1]]  # beyond int16


@pytest.mark.parametrize("finished", [False, True])
@pytest.mark.parametrize("space", [fixed_space(2, 3), variable_space(2, 4, 1)], ids=str)
def test_prefixes_are_told_apart_by_their_thoughts(space: SequenceSpace, finished: bool):
    batch, width = drawn(space, 80), space.max_length + 1
    symbols = symbols_of(space, batch, True).numpy()
    rows, inverse = index_prefixes(symbols, batch.num_steps, num_symbols(space.num_actions, True), finished=finished)

    def prefix(b: int, t: int) -> tuple[tuple[int, int], ...]:
        return tuple(zip(batch.tokens[b, :t].tolist(), batch.actions[b, :t].tolist(), strict=True))

    listed = [prefix(row // width, row % width) for row in rows]
    expected = set()
    for b in range(len(batch)):
        for t in range(batch.num_steps[b] + finished):
            assert listed[inverse[b, t]] == prefix(b, t)
            expected.add(prefix(b, t))
    assert len(listed) == len(expected)
    assert set(listed) == expected
    without = index_prefixes(batch.tokens, batch.num_steps, space.num_actions, finished=finished)
    assert len(without.rows) < len(rows)


def test_equal_tokens_of_different_intentions_are_different_prefixes():
    tokens, actions = np.int16([[1, 0], [1, 0], [1, 0]]), np.int16([[1, 0], [0, 0], [1, 1]])
    steps = np.int16([2, 2, 2])
    index = index_prefixes(join_symbols(tokens, actions, 2, True), steps, 4, finished=True)
    assert index.inverse[0, 1] == index.inverse[2, 1] != index.inverse[1, 1]
    assert len(set(index.inverse[:, 2].tolist())) == 3
    assert len(index.rows) == 1 + 2 + 3
    plain = index_prefixes(join_symbols(tokens, actions, 2, False), steps, 2, finished=True)
    assert plain.rows.tolist() == [0, 1, 2]


@pytest.mark.parametrize("space", [fixed_space(2, 3), variable_space(2, 4, 1)], ids=str)
@torch.no_grad()
def test_a_batch_indexed_with_thoughts_serves_networks_with_and_without_them(space: SequenceSpace):
    batch = drawn(space, 30)
    tensors = TensorBatch(batch, space.num_actions, torch.device("cpu"), finished=False, thought_context=True)
    for thought_context in (False, True):
        network = network_of(space, config_of(thought_context=thought_context)).double()
        values = tensors.of_prefixes(network(tensors.symbols(thought_context), tensors.rows))
        for b in range(len(batch)):
            for t in range(batch.num_steps[b]):
                expected = naive_outputs(network, batch.tokens[b, :t], batch.actions[b, :t])
                np.testing.assert_allclose(values[b, t].numpy(), expected, rtol=1e-8, atol=1e-9)


# --- exact tables in blocks -------------------------------------------------------------------------------------------

BACKBONES = [MLPConfig(hidden_size=6, num_layers=2), config_of((2, 1))]


def all_prefixes(space: SequenceSpace) -> list[tuple[int, ...]]:
    return [index for t in range(space.max_length) for index in np.ndindex(*[space.num_tokens] * t)]


@pytest.mark.parametrize("chunk", [1, 5, 17, 16_384])
@pytest.mark.parametrize("space", [fixed_space(3, 4), fixed_space(2, 1), variable_space(2, 4, 0)], ids=str)
@pytest.mark.parametrize("config", BACKBONES, ids=["mlp", "transformer"])
@torch.no_grad()
def test_tables_in_blocks_list_every_prefix(
    config: MLPConfig | TransformerConfig, space: SequenceSpace, chunk: int, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(exact, "CHUNK", chunk)
    policy = Policy(space, config)
    randomise(policy, seed=3, scale=0.3)
    tables = exact.policy_tables(policy)
    assert [len(table) for table in tables] == [space.num_tokens**t for t in range(space.max_length)]
    for prefix in all_prefixes(space):
        symbols = torch.zeros(1, space.max_length, dtype=torch.int64)
        symbols[0, : len(prefix)] = torch.tensor(prefix)
        expected = policy(symbols, torch.tensor([len(prefix)])).log_policy[0].exp()
        np.testing.assert_allclose(tables[len(prefix)][prefix_row(space, prefix)], expected.numpy(), atol=1e-5)
        if isinstance(config, TransformerConfig) and chunk == 5:
            logits = naive_outputs(policy.network, prefix, ())[: space.num_actions]
            np.testing.assert_allclose(expected.numpy(), softmax(logits, space.allowed[len(prefix)]), atol=1e-5)


@torch.no_grad()
def test_dynamics_error_does_not_depend_on_the_blocks(monkeypatch: pytest.MonkeyPatch):
    space = variable_space(2, 4, 1)
    model, kernel = DynamicsModel(space, config_of()), UniformSubstitution(0.3).kernel(space.allowed)
    randomise(model, seed=4)
    reach = [np.random.default_rng(0).random(2**t) for t in range(4)]
    whole = exact.dynamics_error(model, kernel, reach)
    monkeypatch.setattr(exact, "CHUNK", 3)
    assert exact.dynamics_error(model, kernel, reach) == pytest.approx(whole, abs=1e-6)


# --- k-mers of long sequences -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "space", [fixed_space(4, 200), variable_space(4, 200, 20), fixed_space(20, 500), fixed_space(2, 3000)], ids=str
)
@torch.no_grad()
def test_automatic_kmers_of_long_sequences_stay_within_the_limit(space: SequenceSpace):
    network = build_network(space, 3, MLPConfig(hidden_size=4, num_layers=2))
    assert isinstance(network, PrefixMLP)
    assert network.embedding.shape[0] - 1 <= MAX_EMBEDDINGS
    following = network.kmer_sizes[-1] + 1
    rows = sum(space.max_length * space.num_actions**k for k in (*network.kmer_sizes, following))
    assert space.num_actions**following > MAX_AUTO_KMERS or rows > MAX_EMBEDDINGS, (
        "one size more would have been allowed"
    )
    randomise(network, seed=6, scale=0.2)
    symbols = torch.from_numpy(np.random.default_rng(0).integers(space.num_tokens, size=(1, space.max_length)))
    outputs, state = all_outputs(network, symbols)[0], network.start()
    for t in range(150):
        state = network.extend(state, only(0), symbols[:, t])
    np.testing.assert_allclose(network.outputs(state)[0], outputs[150], rtol=1e-3, atol=1e-3)
    if space.max_length == 200:
        for t in (0, 1, 7, 200):
            expected = mlp_outputs(network, symbols[0, :t].tolist())
            np.testing.assert_allclose(outputs[t].numpy(), expected, rtol=1e-3, atol=1e-3)


def test_automatic_kmers_of_two_hundred_tokens_of_dna():
    network = build_network(fixed_space(4, 200), 3, MLPConfig(hidden_size=4))
    assert isinstance(network, PrefixMLP)
    assert network.kmer_sizes == (1, 2, 3, 4)

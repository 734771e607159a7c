"""What the networks are made of against closed forms: norms, residual and dense blocks, parameters, fields, costs.

The formulas are those of the papers, written out here with plain arithmetic, in float64.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import pytest
import timm
import torch
from timm.layers import BatchNormAct2d, GroupNorm, GroupNorm1, LayerNorm2d
from timm.models.densenet import DenseBlock
from timm.models.resnet import BasicBlock, Bottleneck, ResNet
from timm.models.vgg import VGG
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils.flop_counter import FlopCounterMode

near = partial(torch.testing.assert_close, rtol=1e-10, atol=1e-10)


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def drawn(module: nn.Module, seed: int = 1) -> Any:
    """The module in float64 for inference, nothing in it as it began: no scale is 1, no shift or mean 0."""
    random = torch.Generator().manual_seed(seed)
    module = module.double().eval()
    with torch.no_grad():
        for parameter in module.parameters():
            fan = parameter[0].numel() if parameter.ndim > 1 else 1
            parameter.normal_(generator=random).div_(fan**0.5)
        for name, buffer in module.named_buffers():
            if name.endswith("running_mean"):
                buffer.normal_(generator=random)
            elif name.endswith("running_var"):
                buffer.uniform_(0.5, 2, generator=random)
    return module


def on_meta(name: str) -> Any:
    with torch.device("meta"):
        return timm.create_model(name)


def relu(x: Tensor) -> Tensor:
    return x * (x > 0)


def mean_and_variance(values: Tensor) -> tuple[Tensor, Tensor]:
    """Of all values; the biased variance."""
    mean = values.sum() / values.numel()
    return mean, ((values - mean) ** 2).sum() / values.numel()


def standardised(values: Tensor, eps: float) -> Tensor:
    mean, variance = mean_and_variance(values)
    return (values - mean) / (variance + eps) ** 0.5


def in_inference(norm: Any, x: Tensor) -> Tensor:
    """Batch norm with its running averages."""
    channels = [
        norm.weight[c] * (x[:, c] - norm.running_mean[c]) / (norm.running_var[c] + norm.eps) ** 0.5 + norm.bias[c]
        for c in range(x.shape[1])
    ]
    return torch.stack(channels, 1)


def in_training(norm: Any, x: Tensor) -> Tensor:
    """Batch norm with the statistics of the batch."""
    channels = [norm.weight[c] * standardised(x[:, c], norm.eps) + norm.bias[c] for c in range(x.shape[1])]
    return torch.stack(channels, 1)


def convolved(h: Tensor, weight: Tensor) -> Tensor:
    """A convolution of stride 1 that keeps the size, as one matrix product of channels for each place in the kernel."""
    side, (height, width) = weight.shape[-1], h.shape[2:]
    padded = torch.zeros(*h.shape[:2], height + side - 1, width + side - 1, dtype=h.dtype)
    padded[:, :, side // 2 : side // 2 + height, side // 2 : side // 2 + width] = h
    total = torch.zeros(h.shape[0], weight.shape[0], height, width, dtype=h.dtype)
    for y in range(side):
        for x in range(side):
            seen = padded[:, :, y : y + height, x : x + width].flatten(2)
            total += (weight[:, :, y, x] @ seen).view_as(total)
    return total


# Batch norm: Ioffe & Szegedy, 2015


BATCH_NORMS: dict[str, tuple[Callable[..., Any], tuple[int, ...]]] = {
    "(B, C)": (nn.BatchNorm1d, (8, 5)),
    "(B, C, H, W)": (nn.BatchNorm2d, (4, 5, 3, 6)),
    "DenseNet's": (partial(BatchNormAct2d, apply_act=False), (4, 5, 3, 6)),
}
every_batch_norm = pytest.mark.parametrize(("kind", "shape"), BATCH_NORMS.values(), ids=BATCH_NORMS.keys())
every_eps = pytest.mark.parametrize("eps", [1e-5, 0.3])  # one that counts, beside the usual one


@every_eps
@every_batch_norm
def test_batch_norm_in_training(kind: Callable[..., Any], shape: tuple[int, ...], eps: float) -> None:
    """Algorithm 1: y = gamma (x - mu) / sqrt(sigma² + eps) + beta, sigma² the biased variance of the batch.

    Of maps, the batch is all places of all images (section 3.2).
    """
    norm, x = drawn(kind(shape[1], eps=eps)).train(), draw(*shape)
    near(norm(x), in_training(norm, x))


@every_eps
@every_batch_norm
def test_batch_norm_in_inference(kind: Callable[..., Any], shape: tuple[int, ...], eps: float) -> None:
    """Algorithm 2: as in training, with the running averages, which stay what they are."""
    norm, x = drawn(kind(shape[1], eps=eps)), draw(*shape)
    before = norm.running_mean.clone(), norm.running_var.clone()
    near(norm(x), in_inference(norm, x))
    assert torch.equal(norm.running_mean, before[0]) and torch.equal(norm.running_var, before[1])


@pytest.mark.parametrize("alpha", [0.9, 0.6])
@every_batch_norm
def test_running_averages(kind: Callable[..., Any], shape: tuple[int, ...], alpha: float) -> None:
    """running = alpha running + (1 - alpha) batch is PyTorch's with momentum = 1 - alpha.

    The variance that PyTorch averages is the unbiased one, m / (m - 1) sigma², as in Algorithm 2. Of batches of one
    size, what they put into the average of biased ones is therefore m / (m - 1) times as much; the beginning is not.
    """
    norm = drawn(kind(shape[1], momentum=1 - alpha)).train()
    mean, unbiased = norm.running_mean.clone(), norm.running_var.clone()
    biased, begun = unbiased.clone(), unbiased.clone()
    m = draw(*shape)[:, 0].numel()
    for number in range(4):
        x = draw(*shape, seed=10 + number) * (number + 1) + number
        norm(x)
        for c in range(shape[1]):
            of_batch, variance = mean_and_variance(x[:, c])
            mean[c] = alpha * mean[c] + (1 - alpha) * of_batch
            biased[c] = alpha * biased[c] + (1 - alpha) * variance
            unbiased[c] = alpha * unbiased[c] + (1 - alpha) * variance * m / (m - 1)
        near(norm.running_mean, mean)
        near(norm.running_var, unbiased)
        left = alpha ** (number + 1) * begun
        near(norm.running_var, left + (biased - left) * m / (m - 1))
        assert not torch.allclose(norm.running_var, biased)
    assert norm.num_batches_tracked == 4
    near(norm.eval()(x), in_inference(norm, x))


@every_batch_norm
def test_running_averages_without_momentum(kind: Callable[..., Any], shape: tuple[int, ...]) -> None:
    """The plain average over batches, each of which counts the same, of whatever size; the beginning is forgotten."""
    norm = drawn(kind(shape[1], momentum=None)).train()
    means, variances = [], []
    for number in range(4):
        x = draw(3 + 2 * number, *shape[1:], seed=10 + number) * (number + 1) + number
        norm(x)
        found = [mean_and_variance(x[:, c]) for c in range(shape[1])]
        m = x[:, 0].numel()
        means.append(torch.stack([mean for mean, _ in found]))
        variances.append(torch.stack([variance * m / (m - 1) for _, variance in found]))
        near(norm.running_mean, sum(means) / len(means))
        near(norm.running_var, sum(variances) / len(variances))


@pytest.mark.parametrize("name", ["resnet18", "resnet50", "resnext50_32x4d", "densenet121", "vgg16_bn"])
def test_batch_norms_of_the_networks(name: str) -> None:
    """alpha = 0.9, eps = 1e-5, a scale and a shift."""
    norms = [module for module in on_meta(name).modules() if isinstance(module, nn.modules.batchnorm._BatchNorm)]
    assert len(norms) > 10
    assert {(n.momentum, n.eps, n.affine, n.track_running_stats) for n in norms} == {(0.1, 1e-5, True, True)}


@every_eps
@every_batch_norm
def test_gradients_of_batch_norm(kind: Callable[..., Any], shape: tuple[int, ...], eps: float) -> None:
    """Section 3, with the chain rule through mu and sigma² gathered up, exact for any eps, m values a channel:

    dL/dgamma = sum dL/dy x̂, dL/dbeta = sum dL/dy,
    dL/dx_i = gamma / sqrt(sigma² + eps) (dL/dy_i - 1/m sum_j dL/dy_j - x̂_i/m sum_j dL/dy_j x̂_j).
    """
    norm = drawn(kind(shape[1], eps=eps)).train()
    x, pull = draw(*shape).requires_grad_(), draw(*shape, seed=2)
    found = torch.autograd.grad(norm(x), [norm.weight, norm.bias, x], pull)
    of_gamma, of_beta, of_x = (
        torch.zeros(shape[1]).double(),
        torch.zeros(shape[1]).double(),
        torch.zeros(shape).double(),
    )
    with torch.no_grad():
        for c in range(shape[1]):
            up, m = pull[:, c], pull[:, c].numel()
            _, variance = mean_and_variance(x[:, c])
            x_hat = standardised(x[:, c], eps)
            of_gamma[c], of_beta[c] = (up * x_hat).sum(), up.sum()
            scale = norm.weight[c] / (variance + eps) ** 0.5
            of_x[:, c] = scale * (up - up.sum() / m - x_hat / m * (up * x_hat).sum())
    for each, expected in zip(found, (of_gamma, of_beta, of_x), strict=True):
        near(each, expected)


@every_batch_norm
def test_gradients_of_batch_norm_in_inference(kind: Callable[..., Any], shape: tuple[int, ...]) -> None:
    """Running averages do not depend on x: dL/dx = gamma / sqrt(running sigma² + eps) dL/dy, x̂ is by them too."""
    norm = drawn(kind(shape[1]))
    x, pull = draw(*shape).requires_grad_(), draw(*shape, seed=2)
    of_gamma, of_beta, of_x = torch.autograd.grad(norm(x), [norm.weight, norm.bias, x], pull)
    for c in range(shape[1]):
        deviation = (norm.running_var[c] + norm.eps) ** 0.5
        near(of_gamma[c], (pull[:, c] * (x[:, c] - norm.running_mean[c]) / deviation).sum())
        near(of_beta[c], pull[:, c].sum())
        near(of_x[:, c], pull[:, c] * norm.weight[c] / deviation)


@every_batch_norm
def test_gradients_of_batch_norm_by_differences(kind: Callable[..., Any], shape: tuple[int, ...]) -> None:
    norm = drawn(kind(shape[1], eps=0.1, track_running_stats=False)).train()

    def output(x: Tensor, gamma: Tensor, beta: Tensor) -> Any:
        return functional_call(norm, {"weight": gamma, "bias": beta}, (x,))

    given = draw(3, 5, *shape[2:]), norm.weight.detach().clone(), norm.bias.detach().clone()
    assert torch.autograd.gradcheck(output, [each.requires_grad_() for each in given])


# Norms of single samples


@every_eps
def test_layer_norm(eps: float) -> None:
    """Ba et al., 2016, equation 3: mean and biased variance over the H features of each sample.

    Scale and shift are of each feature.
    """
    norm, x = drawn(nn.LayerNorm(7, eps=eps)), draw(4, 7)
    rows = [norm.weight * standardised(row, eps) + norm.bias for row in x]
    near(norm(x), torch.stack(rows))


def in_groups(norm: Any, x: Tensor, groups: int) -> Tensor:
    """Group norm: Wu & He, 2018: mean and variance over the C / G channels of a group, and all places, of each sample.

    Scale and shift are of each channel.
    """
    found, size = torch.empty_like(x), x.shape[1] // groups
    for sample, out in zip(x, found, strict=True):
        for first in range(0, x.shape[1], size):
            out[first : first + size] = standardised(sample[first : first + size], norm.eps)
    return torch.stack([norm.weight[c] * found[:, c] + norm.bias[c] for c in range(x.shape[1])], 1)


@every_eps
@pytest.mark.parametrize("groups", [1, 2, 3, 6])
def test_group_norm(groups: int, eps: float) -> None:
    x = draw(3, 6, 4, 5) + torch.arange(6).view(6, 1, 1)
    for norm in (nn.GroupNorm(groups, 6, eps=eps), GroupNorm(6, groups, eps=eps)):
        near(drawn(norm)(x), in_groups(norm, x, groups))


@every_eps
def test_layer_norm_of_maps_is_group_norm_of_one_group(eps: float) -> None:
    """Over all channels and places of a sample (Wu & He, 2018, section 3.1), with a scale and shift of each channel."""
    x = draw(3, 6, 4, 5) + torch.arange(6).view(6, 1, 1)
    norm = drawn(nn.GroupNorm(1, 6, eps=eps))
    expected = torch.stack(
        [torch.stack([norm.weight[c] * standardised(image, eps)[c] + norm.bias[c] for c in range(6)]) for image in x]
    )
    near(norm(x), expected)
    near(drawn(GroupNorm1(6, eps=eps))(x), expected)
    plain = nn.LayerNorm((6, 4, 5), eps=eps, elementwise_affine=False)
    near(plain(x) * norm.weight.view(6, 1, 1) + norm.bias.view(6, 1, 1), expected)


def test_timm_s_layer_norm_of_maps_is_another() -> None:
    """Over the channels of each place, as in ConvNeXt: not over channels and places."""
    x = draw(3, 6, 4, 5) + torch.arange(6).view(6, 1, 1)
    norm = drawn(LayerNorm2d(6))
    expected = torch.empty_like(x)
    for b in range(3):
        for h in range(4):
            for w in range(5):
                expected[b, :, h, w] = norm.weight * standardised(x[b, :, h, w], norm.eps) + norm.bias
    near(norm(x), expected)
    assert not torch.allclose(expected, in_groups(norm, x, 1), atol=0.01)


@every_eps
def test_instance_norm_is_group_norm_of_single_channels(eps: float) -> None:
    """Ulyanov et al., 2016: mean and biased variance over the places of each channel of each sample."""
    x = draw(3, 6, 4, 5) + torch.arange(6).view(6, 1, 1)
    norm = drawn(nn.InstanceNorm2d(6, affine=True, eps=eps))
    expected = torch.empty_like(x)
    for b in range(3):
        for c in range(6):
            expected[b, c] = norm.weight[c] * standardised(x[b, c], eps) + norm.bias[c]
    near(norm(x), expected)
    grouped = nn.GroupNorm(6, 6, eps=eps).double()
    grouped.load_state_dict(norm.state_dict())
    near(grouped(x), expected)
    near(drawn(norm).train()(x), expected)  # there is nothing to run an average of


# Residual blocks: He et al., 2015


def matrix_of_convolution(weight: Tensor, images: int, side: int) -> Tensor:
    """A 3 x 3 convolution of stride 1 and padding 1 as one matrix from all inputs to all outputs."""
    outputs, inputs = weight.shape[:2]
    matrix = torch.zeros(images, outputs, side, side, images, inputs, side, side, dtype=weight.dtype)
    for y in range(side):
        for x in range(side):
            for i in range(max(0, y - 1), min(side, y + 2)):
                for j in range(max(0, x - 1), min(side, x + 2)):
                    for image in range(images):
                        matrix[image, :, y, x, image, :, i, j] = weight[:, :, i - y + 1, j - x + 1]
    return matrix.reshape(images * outputs * side * side, images * inputs * side * side)


def matrix_of_batch_norm(norm: Any, x: Tensor) -> Tensor:
    """Derivatives of all outputs by all inputs: gamma / sigma (1 - 1/m - x̂ x̂ᵀ/m) in training, within a channel."""
    images, channels, side, _ = x.shape
    matrix = torch.zeros(*x.shape, *x.shape, dtype=x.dtype)
    for c in range(channels):
        m = x[:, c].numel()
        block = torch.eye(m, dtype=x.dtype)
        variance = norm.running_var[c]
        if norm.training:
            x_hat = standardised(x[:, c], norm.eps).flatten()
            variance = mean_and_variance(x[:, c])[1]
            block = block - 1 / m - x_hat.view(m, 1) * x_hat / m
        block = norm.weight[c] / (variance + norm.eps) ** 0.5 * block
        matrix[:, c, :, :, :, c] = block.view(images, side, side, images, side, side)
    return matrix.reshape(x.numel(), x.numel())


def residual(block: Any, h: Tensor) -> tuple[Tensor, Tensor]:
    """F(h) of a basic block, and the matrix of its derivatives."""
    normalise = in_training if block.training else in_inference
    first, second = (matrix_of_convolution(conv.weight, len(h), h.shape[-1]) for conv in (block.conv1, block.conv2))
    a = (first @ h.flatten()).view_as(h)
    b = normalise(block.bn1, a)
    c = (second @ relu(b).flatten()).view_as(h)
    kept = (b > 0).double().flatten().diag()
    slope = matrix_of_batch_norm(block.bn2, c) @ second @ kept @ matrix_of_batch_norm(block.bn1, a) @ first
    return normalise(block.bn2, c), slope


@pytest.mark.parametrize("training", [True, False])
@torch.no_grad()
def test_gradient_flow_as_written(training: bool) -> None:
    """h' = h + F(h), so dL/dh = dL/dh' (1 + dF/dh): He et al., 2016 (Identity Mappings), equation 5 for one block.

    That is a block without its last ReLU.
    """
    block, h, pull = drawn(BasicBlock(2, 2)).train(training), draw(2, 2, 3, 3), draw(2, 2, 3, 3, seed=2)
    block.act2 = nn.Identity()
    f, slope = residual(block, h)
    near(block(h), h + f)
    whole = torch.eye(h.numel(), dtype=h.dtype) + slope
    near(torch.autograd.functional.jacobian(block, h).view(h.numel(), h.numel()), whole)
    with torch.enable_grad():
        h.requires_grad_()
        (found,) = torch.autograd.grad(block(h), h, pull)
    near(found.flatten(), pull.flatten() @ whole)
    assert slope.abs().max() > 0.1


@pytest.mark.parametrize("training", [True, False])
@torch.no_grad()
def test_gradient_flow_as_built(training: bool) -> None:
    """With the ReLU after the sum: dL/dh = (dL/dh' where h + F(h) > 0, else 0) (1 + dF/dh)."""
    block, h, pull = drawn(BasicBlock(2, 2)).train(training), draw(2, 2, 3, 3), draw(2, 2, 3, 3, seed=2)
    f, slope = residual(block, h)
    passed = h + f > 0
    assert 0 < passed.sum() < h.numel()
    near(block(h), relu(h + f))
    with torch.enable_grad():
        h.requires_grad_()
        (found,) = torch.autograd.grad(block(h), h, pull)
    near(found.flatten(), (pull * passed).flatten() @ (torch.eye(h.numel(), dtype=h.dtype) + slope))


BLOCKS: dict[str, Callable[[], Any]] = {
    "basic": lambda: BasicBlock(8, 8),
    "bottleneck": lambda: Bottleneck(8, 2),
    "ResNeXt": lambda: Bottleneck(8, 2, cardinality=2, base_width=64),
}


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("make", BLOCKS.values(), ids=BLOCKS.keys())
def test_identity_where_the_residual_is_zero(make: Callable[[], Any], training: bool) -> None:
    """F = 0: h' = h, to the bit where h >= 0, as all h after a ReLU are; the gradient passes unchanged."""
    block = drawn(make()).train(training)
    h, pull = draw(3, 8, 5, 5), draw(3, 8, 5, 5, seed=2)
    assert not torch.allclose(block(h), relu(h), atol=0.1)
    last = [module for module in block.modules() if isinstance(module, nn.BatchNorm2d)][-1]
    nn.init.zeros_(last.weight)
    nn.init.zeros_(last.bias)
    positive = h.abs().requires_grad_()
    output = block(positive)
    assert torch.equal(output, positive)
    assert torch.equal(torch.autograd.grad(output, positive, pull)[0], pull)
    assert torch.equal(block(h), relu(h))


@pytest.mark.parametrize("block", [BasicBlock, Bottleneck])
def test_an_untrained_network_begins_with_identities(block: Any) -> None:
    """Of all blocks that keep shape and size (Goyal et al., 2017: the last scale begins at 0)."""
    network = ResNet(block, [2, 2, 2, 2], channels=(4, 4, 4, 4))
    kept = [module for module in network.modules() if isinstance(module, block) and module.downsample is None]
    assert len(kept) == 4  # the second of each stage
    for each in kept:
        h = draw(2, each.conv1.in_channels, 4, 4).abs().float()
        assert torch.equal(each(h), h)


@torch.no_grad()
def test_bottleneck_as_written() -> None:
    """h' = h + W3 relu(W2 relu(W1 h)): He et al., 2015, figure 5, without norms and without the last ReLU."""
    block, h = drawn(Bottleneck(256, 64, norm_layer=nn.Identity)), draw(2, 256, 5, 4)
    block.act3 = nn.Identity()
    w1, w2, w3 = block.conv1.weight, block.conv2.weight, block.conv3.weight
    assert [tuple(w.shape) for w in (w1, w2, w3)] == [(64, 256, 1, 1), (64, 64, 3, 3), (256, 64, 1, 1)]
    inner = relu((w1.view(64, 256) @ h.flatten(2)).view(2, 64, 5, 4))
    inner = relu(convolved(inner, w2))
    near(block(h), h + (w3.view(256, 64) @ inner.flatten(2)).view_as(h))


@torch.no_grad()
def test_bottleneck_as_built() -> None:
    """A batch norm after each convolution, here in inference, and a ReLU after the sum."""
    block, h = drawn(Bottleneck(256, 64)), draw(2, 256, 5, 4)
    w1, w2, w3 = block.conv1.weight, block.conv2.weight, block.conv3.weight
    inner = relu(in_inference(block.bn1, (w1.view(64, 256) @ h.flatten(2)).view(2, 64, 5, 4)))
    inner = relu(in_inference(block.bn2, convolved(inner, w2)))
    f = in_inference(block.bn3, (w3.view(256, 64) @ inner.flatten(2)).view_as(h))
    near(block(h), relu(h + f))


def test_bottleneck_of_resnet50() -> None:
    network = on_meta("resnet50")
    for block in network.layer1[1:]:
        shapes = [tuple(conv.weight.shape) for conv in (block.conv1, block.conv2, block.conv3)]
        assert shapes == [(64, 256, 1, 1), (64, 64, 3, 3), (256, 64, 1, 1)]
        assert all(conv.bias is None for conv in (block.conv1, block.conv2, block.conv3)) and block.downsample is None
    assert [len(network.get_submodule(f"layer{stage}")) for stage in (1, 2, 3, 4)] == [3, 4, 6, 3]


@pytest.mark.parametrize(("paths", "width"), [(1, 64), (2, 40), (32, 4)])
@torch.no_grad()
def test_grouped_convolution_is_a_sum_of_paths(paths: int, width: int) -> None:
    """Xie et al., 2017, equation 3, figure 3 (a) = (c): h' = h + sum over g of F_g(h), then the last ReLU.

    Each path has its own rows of W1, its own filters of W2 and its own columns of W3. The last batch norm is linear:
    its scale goes into each path, its shift to each in equal parts.
    """
    block, h = drawn(Bottleneck(256, 64, cardinality=paths, base_width=width)), draw(2, 256, 4, 3)
    assert block.conv2.weight.shape == (paths * width, width, 3, 3) and block.conv2.groups == paths
    last = block.bn3
    scale = last.weight / (last.running_var + last.eps) ** 0.5
    shift = last.bias - scale * last.running_mean
    total = h.clone()
    for path in range(paths):
        own = slice(path * width, (path + 1) * width)
        first, second = nn.BatchNorm2d(width).double(), nn.BatchNorm2d(width).double()
        for small, whole in ((first, block.bn1), (second, block.bn2)):
            small.load_state_dict(
                {key: value[own] if value.ndim else value for key, value in whole.state_dict().items()}
            )
        x = relu(in_inference(first, (block.conv1.weight[own].flatten(1) @ h.flatten(2)).view(2, width, 4, 3)))
        x = relu(in_inference(second, convolved(x, block.conv2.weight[own])))
        f = (block.conv3.weight[:, own].flatten(1) @ x.flatten(2)).view_as(h)
        total += f * scale.view(-1, 1, 1) + shift.view(-1, 1, 1) / paths
    near(block(h), relu(total))


def test_paths_of_resnext50() -> None:
    """Xie et al., 2017, table 1: 32 paths of width 4, 8, 16 and 32."""
    network = on_meta("resnext50_32x4d")
    for stage, width in ((1, 4), (2, 8), (3, 16), (4, 32)):
        for block in network.get_submodule(f"layer{stage}"):
            assert block.conv2.groups == 32
            assert tuple(block.conv2.weight.shape) == (32 * width, width, 3, 3)


# Dense connections: Huang et al., 2017


@torch.no_grad()
def test_dense_block() -> None:
    """Equation 2: h_l = H_l([h_0, ..., h_(l-1)]), the output is all of them; norm, ReLU, 1 x 1, norm, ReLU, 3 x 3."""
    block, h = drawn(DenseBlock(4, 5, bn_size=2, growth_rate=3)), draw(2, 5, 4, 6)
    features = [h]
    for layer in block.values():
        x = torch.cat(features, 1)
        x = convolved(relu(in_inference(layer.norm1, x)), layer.conv1.weight)
        features.append(convolved(relu(in_inference(layer.norm2, x)), layer.conv2.weight))
    found = block(h)
    assert found.shape == (2, 5 + 4 * 3, 4, 6)
    assert torch.equal(found[:, :5], h)
    near(found, torch.cat(features, 1))


@torch.no_grad()
def test_each_dense_layer_sees_all_before_it() -> None:
    """A change of h_l's last convolution changes h_l and all after it, and none before."""
    block, h = drawn(DenseBlock(4, 5, bn_size=2, growth_rate=3)), draw(2, 5, 4, 6)
    before = block(h)[:, 5:].unflatten(1, (4, 3))
    for number, layer in enumerate(block.values()):
        kept = layer.conv2.weight.clone()
        layer.conv2.weight.mul_(2)
        after = block(h)[:, 5:].unflatten(1, (4, 3))
        layer.conv2.weight.copy_(kept)
        changed = [not torch.equal(before[:, each], after[:, each]) for each in range(4)]
        assert changed == [each >= number for each in range(4)]


def test_dense_connections_end_with_their_block() -> None:
    """k0 + k (l - 1) inputs of layer l (section 3, growth rate); a transition halves what it is given, and is alone."""
    network, channels = on_meta("densenet121"), 64
    for number, layers in enumerate((6, 12, 24, 16), start=1):
        block = network.features.get_submodule(f"denseblock{number}")
        assert [layer.conv1.in_channels for layer in block.values()] == [channels + 32 * each for each in range(layers)]
        channels += 32 * layers
        if number < 4:
            transition = network.features.get_submodule(f"transition{number}")
            assert (transition.conv.in_channels, transition.conv.out_channels) == (channels, channels // 2)
            channels //= 2
    assert channels == network.num_features == 1024


# Parameters


VGG16_CHANNELS = (64, 64, 128, 128, 256, 256, 256, 512, 512, 512, 512, 512, 512)
FULLY_CONNECTED = [(7 * 7 * 512, 4096), (4096, 4096), (4096, 1000)]


def held(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def test_parameters_of_vgg16() -> None:
    """k² c_in c_out + c_out for each convolution, in out + out for each fully connected layer."""
    expected, before = [], 3
    for channels in VGG16_CHANNELS:
        expected.append(9 * before * channels + channels)
        before = channels
    expected += [inputs * outputs + outputs for inputs, outputs in FULLY_CONNECTED]
    network = on_meta("vgg16")
    # the fully connected layers but the last are convolutions in timm, the first of them over all of 7 x 7
    layers = [module for module in network.modules() if isinstance(module, nn.Conv2d | nn.Linear)]
    assert [held(layer) for layer in layers] == expected
    assert sum(expected) == held(network) == 138_357_544


@pytest.mark.parametrize(
    ("name", "convolutions", "expected"),
    [("vgg11", 8, 132_863_336), ("vgg13", 10, 133_047_848), ("vgg16", 13, 138_357_544), ("vgg19", 16, 143_667_240)],
)
def test_parameters_of_vggs(name: str, convolutions: int, expected: int) -> None:
    """As torchvision lists them; Simonyan & Zisserman, 2015, table 2, in millions: 133, 133, 138, 144."""
    network = on_meta(name)
    layers = [module for module in network.modules() if isinstance(module, nn.Conv2d | nn.Linear)]
    assert len([layer for layer in layers if layer.weight.shape[2:] == (3, 3)]) == convolutions
    assert len(layers) == convolutions + 3
    total = 0
    for layer in layers:
        outputs, inputs, *kernel = layer.weight.shape
        k = kernel[0] if kernel else 1
        assert held(layer) == k * k * inputs * outputs + outputs
        total += held(layer)
    assert total == expected


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("resnet18", 11_689_512),
        ("resnet50", 25_557_032),
        ("resnet101", 44_549_160),
        ("resnext50_32x4d", 25_028_904),
        ("densenet121", 7_978_856),
    ],
)
def test_parameters_with_groups_and_norms(name: str, expected: int) -> None:
    """k² c_in / groups c_out without a bias, 2 c for each batch norm; the sums are as torchvision lists them."""
    total = 0
    for module in on_meta(name).modules():
        if isinstance(module, nn.Conv2d):
            k, _ = module.kernel_size
            count = k * k * module.in_channels // module.groups * module.out_channels
        elif isinstance(module, nn.BatchNorm2d):
            count = 2 * module.num_features
        elif isinstance(module, nn.Linear):
            count = module.in_features * module.out_features + module.out_features
        else:
            continue
        assert held(module) == count
        total += count
    assert total == expected


ALEXNET = [
    (96, 11, 4, 0, True),
    (256, 5, 1, 2, True),
    (384, 3, 1, 1, False),
    (384, 3, 1, 1, False),
    (256, 3, 1, 1, True),
]
"""Outputs, kernel, stride, padding, and whether 3 x 3 pooling of stride 2 follows: Krizhevsky et al., 2012."""


@pytest.mark.parametrize(
    ("groups", "expected"),
    [((1, 1, 1, 1, 1), 62_378_344), ((1, 2, 1, 2, 2), 60_965_224)],  # the second on the paper's two GPUs
)
def test_parameters_of_alexnet(groups: tuple[int, ...], expected: int) -> None:
    """Sum of k² c_in c_out + c_out, for 227 px; beside it the layers themselves."""
    side, before, total, sides = 227, 3, 0, []
    layers: list[nn.Module] = []
    for (channels, k, stride, padding, pooled), parts in zip(ALEXNET, groups, strict=True):
        total += k * k * (before // parts) * channels + channels
        side = (side + 2 * padding - k) // stride + 1
        sides.append(side)
        layers.append(nn.Conv2d(before, channels, k, stride, padding, groups=parts, device="meta"))
        if pooled:
            side = (side - 3) // 2 + 1
            sides.append(side)
            layers.append(nn.MaxPool2d(3, 2))
        before = channels
    inputs = before * side * side
    for outputs in (4096, 4096, 1000):
        total += inputs * outputs + outputs
        inputs = outputs
    assert total == expected
    assert sides == [55, 27, 27, 13, 13, 13, 13, 6]
    x, seen = torch.zeros(1, 3, 227, 227, device="meta"), []
    for layer in layers:
        x = layer(x)
        seen.append(x.shape[-1])
    assert seen == sides and x.shape[1:] == (256, 6, 6)
    top = [nn.Linear(i, o, device="meta") for i, o in ((9216, 4096), (4096, 4096), (4096, 1000))]
    assert sum(held(layer) for layer in (*layers, *top)) == expected


# Receptive fields: Araujo et al., 2019


def fields(path: Iterable[tuple[int, int]]) -> list[tuple[int, int]]:
    """Field r and step j after each layer of kernel k and stride s: r += (k - 1) j, then j *= s."""
    r, j, found = 1, 1, []
    for k, s in path:
        r, j = r + (k - 1) * j, j * s
        found.append((r, j))
    return found


def path_through(network: nn.Module) -> list[tuple[int, int, int]]:
    """Kernel, stride and padding of all layers, shortcuts apart, in which timm's order is that of their use."""
    path = []
    for name, module in network.named_modules():
        if isinstance(module, nn.Conv2d | nn.MaxPool2d | nn.AvgPool2d) and "downsample" not in name:
            sizes = (module.kernel_size, module.stride, module.padding)
            k, s, p = (size if isinstance(size, int) else size[0] for size in sizes)
            path.append((k, s, p))
    return path


def test_fields_of_vgg16() -> None:
    """A 3 x 3 convolution adds 2 before the first pooling, then 2 steps; pooling adds k - 1 steps and doubles them."""
    found = fields((k, s) for k, s, _ in path_through(on_meta("vgg16").features))
    expected = [3, 5, 6, 10, 14, 16, 24, 32, 40, 44, 60, 76, 92, 100, 132, 164, 196, 212]
    assert [r for r, _ in found] == expected
    pooled = [place for place, (_, j) in enumerate(found) if j > (found[place - 1][1] if place else 1)]
    assert pooled == [2, 5, 9, 13, 17]
    step, before = 1, 1
    for place, (r, j) in enumerate(found):
        assert r - before == (step if place in pooled else 2 * step)
        step *= 2 if place in pooled else 1
        assert j == step
        before = r
    assert step == 32


def of_bottlenecks(repeats: tuple[int, ...], late: bool) -> list[tuple[int, int]]:
    """ResNet's path, with the stride in the 3 x 3 layer: of a stage's first block, or of the last of the one before."""
    path = [(7, 2), (3, 2)]
    for stage, blocks in enumerate(repeats):
        for block in range(blocks):
            first, last = block == 0 and stage > 0, block == blocks - 1 and stage < 3
            path += [(1, 1), (3, 2 if (last if late else first) else 1), (1, 1)]
    return path


@pytest.mark.parametrize(
    ("path", "expected"),
    [
        ([(11, 4), (3, 2), (5, 1), (3, 2), (3, 1), (3, 1), (3, 1), (3, 2)], 195),  # AlexNet
        (of_bottlenecks((3, 4, 6, 3), late=True), 483),
        (of_bottlenecks((3, 4, 23, 3), late=True), 1027),
        (of_bottlenecks((3, 8, 36, 3), late=True), 1507),
    ],
)
def test_published_fields(path: list[tuple[int, int]], expected: int) -> None:
    """The paper's table, whose ResNets are TF-Slim's; and r = 1 + sum of (k_l - 1) times all strides before."""
    assert fields(path)[-1] == (expected, 32)
    closed = 1
    for place, (k, _) in enumerate(path):
        strides = 1
        for _, s in path[:place]:
            strides *= s
        closed += (k - 1) * strides
    assert closed == expected


@pytest.mark.parametrize(
    ("name", "expected"), [("resnet18", 435), ("resnet34", 899), ("resnet50", 427), ("resnet101", 971)]
)
def test_fields_of_timm_s_resnets(name: str, expected: int) -> None:
    network = on_meta(name)
    path = [(k, s) for k, s, _ in path_through(network)]
    assert fields(path)[-1] == (expected, 32)
    if name in ("resnet50", "resnet101"):
        assert path == of_bottlenecks((3, 4, 6 if name == "resnet50" else 23, 3), late=False)


def convolution(k: int, s: int = 1, p: int = 0) -> nn.Module:
    return nn.Conv2d(1, 1, k, s, p)


THIN: dict[str, Any] = {  # with few channels, which do not matter
    "3 convolutions": lambda: nn.Sequential(*(convolution(3, p=1) for _ in range(3))),
    "pooling between": lambda: nn.Sequential(
        convolution(3, p=1), convolution(3, p=1), nn.MaxPool2d(2), convolution(3, p=1), nn.MaxPool2d(3, 2, 1)
    ),
    "strides": lambda: nn.Sequential(convolution(7, 2, 3), nn.AvgPool2d(3, 2), convolution(5, 2, 2), convolution(4)),
    "AlexNet": lambda: nn.Sequential(
        *(
            layer
            for _, k, s, p, pooled in ALEXNET
            for layer in (convolution(k, s, p), *([nn.MaxPool2d(3, 2)] if pooled else []))
        )
    ),
    "VGG-16": lambda: VGG([1, 1, "M", 1, 1, "M", 1, 1, 1, "M", 1, 1, 1, "M", 1, 1, 1, "M"], in_chans=1).features,
    "basic blocks": lambda: nn.Sequential(BasicBlock(1, 1), BasicBlock(1, 1)),
    "bottlenecks": lambda: nn.Sequential(Bottleneck(4, 1), Bottleneck(4, 1)),
    "dense layers": lambda: DenseBlock(3, 1, bn_size=1, growth_rate=1),
    "ResNet-18": lambda: ResNet(
        BasicBlock, [2, 2, 2, 2], in_chans=1, channels=(1, 1, 1, 1), global_pool="", num_classes=0
    ),
    "ResNet-50": lambda: ResNet(
        Bottleneck, [3, 4, 6, 3], in_chans=1, channels=(1, 1, 1, 1), global_pool="", num_classes=0
    ),
}


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("3 convolutions", 7),
        ("pooling between", 14),
        ("strides", 51),
        ("AlexNet", 195),
        ("VGG-16", 212),
        ("basic blocks", 9),
        ("bottlenecks", 5),
        ("dense layers", 7),
        ("ResNet-18", 435),
        ("ResNet-50", 427),
    ],
)
def test_fields_by_gradients(name: str, expected: int) -> None:
    """An output depends on a square of side r of the input, and on nothing else: r is that of the longest path.

    Unit i's square begins at i j - (sum of all paddings, each times the step before it). Everything is positive, so
    that no dependences cancel and no ReLU stops one, and pooling is by average: a maximum depends on one input.
    """
    with torch.device("meta"):
        network = THIN[name]()
    path = path_through(network)
    (r, j), padding, step = fields((k, s) for k, s, _ in path)[-1], 0, 1
    for _, s, p in path:
        padding, step = padding + p * step, step * s
    assert r == expected
    network = network.to_empty(device="cpu").double().eval()
    for parent in list(network.modules()):
        for child, module in list(parent.named_children()):
            if isinstance(module, nn.MaxPool2d):
                setattr(parent, child, nn.AvgPool2d(module.kernel_size, module.stride, module.padding))
    for key, tensor in network.state_dict().items():
        tensor.fill_(0 if key.endswith("running_mean") else 1)  # in place: these are the network's own
    unit = padding // j + 1
    first = unit * j - padding
    channels = next(module.in_channels for module in network.modules() if isinstance(module, nn.Conv2d))
    side = first + r + j
    x = torch.ones(1, channels, side, side, dtype=torch.float64, requires_grad=True)
    (gradient,) = torch.autograd.grad(network(x)[0, -1, unit, unit], x)
    square = torch.zeros(side, side, dtype=torch.bool)
    square[first : first + r, first : first + r] = True
    assert first >= 1 and first + r < side  # nothing of the square is cut away
    for of_channel in gradient[0]:
        assert torch.equal(of_channel != 0, square)


# Costs


@pytest.mark.parametrize(
    ("inputs", "outputs", "k", "stride", "padding", "groups"),
    [
        (3, 4, 3, 1, 1, 1),
        (4, 6, 3, 2, 1, 2),
        (4, 4, 3, 1, 1, 4),
        (6, 4, 1, 1, 0, 2),
        (2, 3, 5, 3, 2, 1),
    ],
)
def test_costs_of_a_convolution(inputs: int, outputs: int, k: int, stride: int, padding: int, groups: int) -> None:
    """H W c_out k² c_in / groups multiplications, H and W of the output: as many as loops make.

    Those with a padding's zeros count. PyTorch counts two operations each, one of them an addition.
    """
    layer, image = drawn(nn.Conv2d(inputs, outputs, k, stride, padding, groups=groups)), draw(1, inputs, 7, 6)
    padded = torch.zeros(inputs, 7 + 2 * padding, 6 + 2 * padding).double()
    padded[:, padding : padding + 7, padding : padding + 6] = image[0]
    pixels, weight, bias = padded.tolist(), layer.weight.tolist(), layer.bias.tolist()
    height, width = (7 + 2 * padding - k) // stride + 1, (6 + 2 * padding - k) // stride + 1
    multiplications, found = 0, torch.zeros(1, outputs, height, width).double()
    for o in range(outputs):
        first = o // (outputs // groups) * (inputs // groups)
        for y in range(height):
            for x in range(width):
                total = bias[o]
                for c in range(inputs // groups):
                    for i in range(k):
                        for j in range(k):
                            total += weight[o][c][i][j] * pixels[first + c][y * stride + i][x * stride + j]
                            multiplications += 1
                found[0, o, y, x] = total
    counter = FlopCounterMode(display=False)
    with counter, torch.no_grad():
        near(layer(image), found)
    assert multiplications == height * width * outputs * k * k * inputs // groups
    assert counter.get_total_flops() == 2 * multiplications


def test_costs_of_vgg16() -> None:
    """Sum of H W c_out k² c_in, by the sides of the maps at 224 px; half of the operations that PyTorch counts."""
    sides = (224, 224, 112, 112, 56, 56, 56, 28, 28, 28, 14, 14, 14)
    total, before = 0, 3
    for side, channels in zip(sides, VGG16_CHANNELS, strict=True):
        total += side * side * channels * 9 * before
        before = channels
    total += sum(inputs * outputs for inputs, outputs in FULLY_CONNECTED)
    assert total == 15_470_264_320
    counter = FlopCounterMode(display=False)
    with counter, torch.no_grad():
        on_meta("vgg16").eval()(torch.zeros(1, 3, 224, 224, device="meta"))
    assert counter.get_total_flops() == 2 * total


@pytest.mark.parametrize(
    ("name", "expected"), [("resnet18", 1.81), ("resnet50", 4.09), ("resnext50_32x4d", 4.23), ("densenet121", 2.83)]
)
def test_costs_of_networks(name: str, expected: float) -> None:
    """In 10⁹ multiplications at 224 px, as torchvision lists them (under "GFLOPS")."""
    network, total = on_meta(name).eval(), 0

    def add(layer: Any, _: object, output: Tensor) -> None:
        nonlocal total
        if isinstance(layer, nn.Linear):
            total += layer.in_features * layer.out_features
        else:
            k, places = layer.kernel_size[0], output.shape[2] * output.shape[3]
            total += places * layer.out_channels * k * k * layer.in_channels // layer.groups

    for module in network.modules():
        if isinstance(module, nn.Conv2d | nn.Linear):
            module.register_forward_hook(add)
    counter = FlopCounterMode(display=False)
    with counter, torch.no_grad():
        network(torch.zeros(1, 3, 224, 224, device="meta"))
    assert counter.get_total_flops() == 2 * total
    assert round(total / 1e9, 2) == expected

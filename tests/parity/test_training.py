"""Gradients and steps of training are those of torch through diffusers' transformer, and its files load there."""

import mlx.core as mx
import numpy as np
import pytest
import tiny
from compare import relative_error
from mlx.utils import tree_unflatten

from mlx_zimage import ZImagePipeline
from mlx_zimage.models.layers import dequantize, pack
from mlx_zimage.models.runner import PlainRunner
from mlx_zimage.models.transformer import TransformerConfig
from mlx_zimage.quantization import Quantization
from mlx_zimage.train.factors import Factors, deltas, new_factors
from mlx_zimage.train.gradients import Gradients, Sample
from mlx_zimage.train.optimizer import AdamW, clipped
from mlx_zimage.train.output import write_factors
from mlx_zimage.train.settings import Settings
from mlx_zimage.weights.quantize import tensor_quantization

SCALE, SEED = 0.5, 11
RUN = {"base_sha256": "0" * 64, "dtype": "mlx.core.float32", "adapter": None}
# float32: sums over tokens in another order, forward and back; measured 2e-5 of a gradient's largest value
TOLERANCE = 1e-4


@pytest.fixture(scope="module")
def torch(reference):
    with reference.torch.enable_grad():
        yield reference.torch


@pytest.fixture(scope="module", params=["tiny", "wide in 4 bits"])
def base(request, reference):
    """A config, weights by name and a tree to compute with: dense, or in 4 bits with the weights that these stand for.

    Only the wide model's layers are wide enough for a group."""
    raw = tiny.TRANSFORMER if request.param == "tiny" else tiny.WIDE_TRANSFORMER
    config, arrays, found = TransformerConfig.from_dict(raw), {}, {}
    for name, array in tiny.weights(SEED, "transformer", raw).items():
        q = (
            None
            if request.param == "tiny"
            else tensor_quantization("transformer", name, array.shape, Quantization(4, 32))
        )
        if q is None:
            arrays[name] = array
            found[name] = config.sanitize(name, mx.array(array))
            continue
        packed, layer = pack(name, mx.array(array), q), name.removesuffix(".weight")
        parts = {part.rpartition(".")[2]: tensor for part, tensor in packed.items()}
        arrays[name] = np.array(dequantize({**parts, "packing": q.to_dict()}, mx.float32))
        found |= {part: config.sanitize(part, tensor) for part, tensor in packed.items()}
        found |= {f"{layer}.packing.{key}": value for key, value in q.to_dict().items()}
    return raw, config, arrays, tree_unflatten(list(found.items()))


@pytest.fixture(scope="module")
def model(reference, torch, base):
    """diffusers' transformer on the same weights."""
    from diffusers import ZImageTransformer2DModel

    raw, _, arrays, _ = base
    model = ZImageTransformer2DModel.from_config(raw).to(torch.float32)
    model.load_state_dict({name: torch.from_numpy(array.copy()) for name, array in arrays.items()})
    return model.requires_grad_(False)


def random_factors(config: TransformerConfig, extras: tuple = ()) -> Factors:
    factors = new_factors(config, 4, extras, seed=0)
    for block, layers in factors.items():
        for layer, own in layers.items():
            own["up"] = mx.array(0.3 * tiny.randn(0, f"{block}.{layer}.up", *own["up"].shape))
    return factors


def in_torch(torch, config: TransformerConfig, factors: Factors) -> dict:
    """Factors by the weights' names, as torch's parameters, rows in the checkpoint's order."""
    made = {}
    for name, delta in deltas(factors, 1.0, config).items():
        parts = (torch.from_numpy(np.array(part)).requires_grad_() for part in (delta.down, delta.up))
        made[name] = dict(zip(("down", "up"), parts, strict=True))
    return made


def their_loss(torch, model, lora: dict, sample: Sample):
    weights = dict(model.named_parameters())
    changed = {name: weights[name] + SCALE * own["up"] @ own["down"] for name, own in lora.items()}
    latents, noise, cap_feats = (
        torch.from_numpy(np.array(x)) for x in (sample.latents, sample.noise, sample.cap_feats)
    )
    latents, noise = (x[0].permute(2, 0, 1)[:, None] for x in (latents, noise))
    noisy = (1 - sample.sigma) * latents + sample.sigma * noise
    given = [noisy], torch.tensor([1 - sample.sigma]), [cap_feats]
    found = torch.func.functional_call(model, changed, given, {"return_dict": False})[0][0]
    return sample.weight * ((-found - (noise - latents)) ** 2).mean()


def a_sample(config: TransformerConfig, sigma: float = 0.7) -> Sample:
    latents, noise = (mx.array(tiny.randn(SEED, tag, 1, 12, 10, 16)) for tag in ("x", "noise"))
    return Sample(latents, mx.array(tiny.randn(SEED, "cap", 20, config.cap_feat_dim)), noise, sigma, 1.2)


def assert_same(config: TransformerConfig, ours: Factors, theirs: dict, tolerance: float = TOLERANCE) -> None:
    """Compare factors, or their gradients, with torch's by name."""
    found = deltas(ours, 1.0, config)
    assert found.keys() == theirs.keys()
    for name, wanted in theirs.items():
        for part, own in wanted.items():
            assert relative_error(getattr(found[name], part), own.detach().numpy()) < tolerance, f"{name} {part}"


@pytest.mark.parametrize("extras", [(), ("adaln", "refiners")])
def test_gradients_of_the_loss_match_torch(torch, base, model, extras):
    _, config, _, tree = base
    factors, sample = random_factors(config, extras), a_sample(config)
    lora = in_torch(torch, config, factors)
    loss = their_loss(torch, model, lora, sample)
    loss.backward()
    value, gradients = Gradients(config, PlainRunner(tree), SCALE)(factors, sample)
    assert value.item() == pytest.approx(loss.item(), rel=TOLERANCE)
    assert_same(config, gradients, {n: {p: own.grad for p, own in parts.items()} for n, parts in lora.items()})


def test_a_step_of_adamw_from_the_same_gradients_equals_torchs(torch):
    """float32, a dozen elementwise operations; measured 2e-7 of the largest value."""
    arrays = [tiny.randn(0, tag, 30, 20) for tag in ("p", "d0", "d1")]
    theirs = torch.from_numpy(arrays[0].copy()).requires_grad_()
    adamw = torch.optim.AdamW([theirs], lr=1e-2, weight_decay=0.1)
    factors = {"layers.0": {"attention.to_q": {"down": mx.array(arrays[0])}}}
    ours = AdamW.new(factors)
    for d in arrays[1:]:
        theirs.grad = torch.from_numpy(d.copy())
        adamw.step()
        factors = ours.apply(factors, {"layers.0": {"attention.to_q": {"down": mx.array(d)}}}, 1e-2, 0.1)
    assert relative_error(factors["layers.0"]["attention.to_q"]["down"], theirs.detach().numpy()) < 1e-6


def test_steps_of_adamw_equal_torch(torch, base, model):
    _, config, _, tree = base
    factors = random_factors(config)
    lora = in_torch(torch, config, factors)
    parameters = [own for parts in lora.values() for own in parts.values()]
    theirs = torch.optim.AdamW(parameters, lr=1e-3, weight_decay=0.1)
    ours, gradients = AdamW.new(factors), Gradients(config, PlainRunner(tree), SCALE)
    for sigma in (0.7, 0.3):
        sample = a_sample(config, sigma)
        theirs.zero_grad()
        their_loss(torch, model, lora, sample).backward()
        norm = torch.nn.utils.clip_grad_norm_(parameters, 0.05)
        theirs.step()
        clip, found = clipped(gradients(factors, sample)[1], 0.05)
        assert found == pytest.approx(norm.item(), rel=TOLERANCE)
        factors = ours.apply(factors, clip, 1e-3, 0.1)
    # A step is the rate times a quotient near 1, whatever the gradient's size; where a gradient is smaller than the
    # rounding errors of others, torch and MLX may even disagree about its sign. So steps are compared, not their last
    # bits.
    for name, delta in deltas(factors, 1.0, config).items():
        for part, own in lora[name].items():
            assert np.abs(np.array(getattr(delta, part)) - own.detach().numpy()).mean() < 1e-3 * 1e-2, name


def test_diffusers_generates_with_the_file_what_we_do(reference, torch, tmp_path):
    """Only layers that diffusers' loader knows are in it: its own names, and no alpha."""
    pytest.importorskip("peft", reason="peft is not installed; pip install 'mlx-zimage[parity]'")
    folder, file = tiny.write_checkpoint(tmp_path / "tiny", SEED), tmp_path / "lora.safetensors"
    pipe = ZImagePipeline.from_pretrained(folder, dtype="float32")
    config = pipe.transformer.config
    factors = random_factors(config, ("adaln", "refiners"))
    write_factors(file, factors, Settings(rank=4, alpha=2.0, trigger="sks"), config, "tiny", RUN)
    theirs = reference.open_pipeline(folder)
    plain = their_latents(torch, theirs)
    theirs.load_lora_weights(file)
    pipe.load_lora(file)
    adapted = their_latents(torch, theirs)
    noise = mx.array(tiny.randn(SEED, "latents", 1, 16, 8, 8))
    ours = pipe("a fox", width=64, height=64, num_inference_steps=2, latents=noise, output_type="latent").images
    assert relative_error(adapted, plain) > 0.01
    assert relative_error(ours, adapted) < TOLERANCE  # float32, through two steps of the whole network


def their_latents(torch, theirs) -> np.ndarray:
    latents = torch.from_numpy(tiny.randn(SEED, "latents", 1, 16, 8, 8))
    given = {"width": 64, "height": 64, "num_inference_steps": 2, "guidance_scale": 0.0, "output_type": "latent"}
    with torch.no_grad():
        return theirs("a fox", latents=latents, **given).images.numpy()

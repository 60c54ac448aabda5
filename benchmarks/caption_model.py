"""Pictures of one shape and their captions, and a small text-conditioned UNet trained on them.

Used by `captions.py`. Everything is drawn as it is needed: a caption has five words, "small red
circle top left", and a picture is 12 x 12 pixels in colour.
"""

import itertools
import math
from pathlib import Path

import torch
from diffusers import DDIMScheduler, UNet2DConditionModel
from diffusers.training_utils import EMAModel
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional
from tqdm import tqdm

SIZE, WIDTH = 12, 32
SLOTS = (
    ("small", "large"),
    ("red", "green", "blue", "yellow"),
    ("circle", "square", "triangle", "cross"),
    ("top", "bottom"),
    ("left", "right"),
)
#: Every caption as the place of its word in each slot, int64 [128, 5].
CAPTIONS = torch.tensor(list(itertools.product(*(range(len(slot)) for slot in SLOTS))))
#: Captions are shuffled; the last quarter is kept from calibration and distillation.
ORDER = torch.randperm(len(CAPTIONS), generator=torch.Generator().manual_seed(0))
SEEN, HELD_OUT = ORDER[:96], ORDER[96:]
_COLOURS = torch.tensor([[1.0, -1, -1], [-1, 1, -1], [-1, -1, 1], [1, 1, -1]])


def draw(words: Tensor, generator: torch.Generator | None = None) -> Tensor:
    """Pictures [N, 3, SIZE, SIZE] in [-1, 1] of captions [N, 5], jittered by a generator.

    The ground is 0: all the energy is the shape's.
    """
    size, colour, shape, vertical, horizontal = words.T
    jitter = torch.zeros(len(words), 4)
    if generator is not None:
        jitter = torch.rand(jitter.shape, generator=generator) * 2 - 1
    axis = torch.arange(SIZE) + 0.5
    centre = torch.stack([vertical, horizontal], 1) * SIZE / 2 + SIZE / 4 + 0.4 * jitter[:, :2]
    y = (axis[None, :, None] - centre[:, 0, None, None]).expand(-1, -1, SIZE)
    x = (axis[None, None, :] - centre[:, 1, None, None]).expand(-1, SIZE, -1)
    r = (1.7 + 1.1 * size + 0.1 * jitter[:, 2])[:, None, None]
    ax, ay = x.abs(), y.abs()
    distances = torch.stack(
        [
            (x.square() + y.square()).sqrt() - r,
            torch.maximum(ax, ay) - 0.9 * r,
            torch.maximum(0.87 * ax - 0.5 * y - 0.6 * r, y - 0.8 * r),
            torch.maximum(torch.maximum(ax, ay) - r, torch.minimum(ax, ay) - 0.35 * r),
        ]
    )
    mask = (0.5 - distances[shape, torch.arange(len(words))]).clamp(0, 1)[:, None]
    paint = _COLOURS[colour] * (0.9 + 0.1 * jitter[:, 3:])
    return mask * paint[:, :, None, None]


def judge(images: Tensor) -> Tensor:
    """The captions [N, 5] whose pictures without jitter are the nearest."""
    return CAPTIONS[torch.cdist(images.flatten(1), draw(CAPTIONS).flatten(1)).argmin(1)]


def spoken(words: Tensor) -> str:
    """A caption in words."""
    return " ".join(slot[index] for slot, index in zip(SLOTS, words.tolist(), strict=True))


class TextEncoder(nn.Module):
    """Word and place embeddings; the words of a dropped caption are a word of their own, 0."""

    def __init__(self) -> None:
        super().__init__()
        self.words = nn.Embedding(1 + sum(map(len, SLOTS)), WIDTH)
        self.places = nn.Parameter(torch.randn(len(SLOTS), WIDTH))
        starts = list(itertools.accumulate(map(len, SLOTS[:-1]), initial=1))
        self.register_buffer("starts", torch.tensor(starts), persistent=False)

    def forward(self, words: Tensor, dropped: Tensor | None = None) -> Tensor:
        """States [N, 5, WIDTH] of captions [N, 5]; those of rows `dropped` say nothing."""
        tokens = words + self.starts
        if dropped is not None:
            tokens = tokens.masked_fill(dropped[:, None], 0)
        return self.words(tokens) + self.places


def networks() -> tuple[UNet2DConditionModel, TextEncoder]:
    """Untrained networks."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        unet = UNet2DConditionModel(
            sample_size=SIZE,
            in_channels=3,
            out_channels=3,
            block_out_channels=(16, 32, 48),
            layers_per_block=1,
            norm_num_groups=8,
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
            up_block_types=("UpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
            cross_attention_dim=WIDTH,
            attention_head_dim=4,
        )
        return unet, TextEncoder()


def scheduler() -> DDIMScheduler:
    """The scheduler of training and sampling; the model predicts v, which trains fast."""
    return DDIMScheduler(
        beta_schedule="squaredcos_cap_v2",
        prediction_type="v_prediction",
        clip_sample=True,
        timestep_spacing="trailing",
    )


def train(directory: Path, steps: int, batch: int = 32) -> None:
    """Train both networks and keep the averaged weights."""
    unet, encoder = networks()
    trained = [*unet.parameters(), *encoder.parameters()]
    optimizer = torch.optim.AdamW(trained, lr=2e-3)
    average = EMAModel(trained, decay=0.995, use_ema_warmup=True, inv_gamma=1.0, power=0.75)
    generator, noises = torch.Generator().manual_seed(1), scheduler()
    bar = tqdm(range(steps), desc="train", unit="step")
    for step in bar:
        rate = min(1.0, (step + 1) / 50) * 0.5 * (1 + math.cos(math.pi * step / steps))
        for group in optimizer.param_groups:
            group["lr"] = 2e-3 * rate
        words = CAPTIONS[torch.randint(len(CAPTIONS), (batch,), generator=generator)]
        images = draw(words, generator)
        dropped = torch.rand(batch, generator=generator) < 0.1
        # one offset and equal spacing: each batch covers all noise levels, so losses vary less
        offset = torch.rand((), generator=generator)
        timesteps = ((torch.arange(batch) / batch + offset) % 1.0 * 1000).long()
        noise = torch.randn(images.shape, generator=generator)
        noisy = noises.add_noise(images, noise, timesteps)
        prompt = encoder(words, dropped)
        target = noises.get_velocity(images, noise, timesteps)
        loss = functional.mse_loss(unet(noisy, timesteps, prompt, return_dict=False)[0], target)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        average.step(trained)
        bar.set_postfix(loss=f"{loss.item():.4f}", refresh=False)
    average.copy_to(trained)
    directory.mkdir(parents=True, exist_ok=True)
    save_file(encoder.state_dict(), directory / "text_encoder.safetensors")
    scheduler().save_pretrained(directory / "scheduler")
    unet.save_pretrained(directory / "unet")  # last: its folder says that all is there


def load(directory: Path) -> tuple[UNet2DConditionModel, TextEncoder]:
    """What `train` left."""
    unet = UNet2DConditionModel.from_pretrained(directory / "unet").eval()
    encoder = TextEncoder()
    encoder.load_state_dict(load_file(directory / "text_encoder.safetensors"))
    return unet.requires_grad_(False), encoder.requires_grad_(False)


def seen(seed: int, count: int) -> Tensor:
    """Captions for calibration and training, each at most once."""
    generator = torch.Generator().manual_seed(seed)
    return CAPTIONS[SEEN[torch.randperm(len(SEEN), generator=generator)[:count]]]


@torch.no_grad()
def states(encoder: TextEncoder, words: Tensor) -> dict[str, dict[str, Tensor]]:
    """Both halves of guidance, by the arguments that take them."""
    dropped = torch.ones(len(words), dtype=torch.bool)
    return {
        "conditions": {"encoder_hidden_states": encoder(words)},
        "unconditional": {"encoder_hidden_states": encoder(words, dropped)},
    }


def followed(images: Tensor, words: Tensor) -> float:
    """Share of the images that show every word of their caption."""
    return float((judge(images) == words).all(1).float().mean())

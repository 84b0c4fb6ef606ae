"""Tiny models with random weights from a fixed seed, which build in milliseconds."""

import string

import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from transformers import (
    BertConfig,
    BertModel,
    BertTokenizer,
    CLIPConfig,
    CLIPImageProcessorPil,
    CLIPModel,
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTokenizer,
)

from pipeline.diffusion.patches import PatchAutoencoder
from pipeline.diffusion.scheduler import DDPMScheduler
from pipeline.diffusion.text_to_image import TextToImagePipeline

WORDS = (
    "red",
    "green",
    "blue",
    "yellow",
    "heart",
    "circle",
    "square",
    "cat",
    "dog",
    "face",
    "hot",
    "a",
    "very",
    "long",
)
WIDTH = 16  # of the caption states


def seeded(build, seed: int = 0):
    """Return `build()` with torch's global generator at a seed, and restore the generator."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return build().eval()


def tiny_unet(
    channels: int = 3, sample_size: int | tuple = 8, text: bool = True, seed: int = 0
) -> UNet2DConditionModel:
    """Return a denoiser of 66,000 weights; with `text` captions steer its time embedding too."""
    return seeded(
        lambda: UNet2DConditionModel(
            sample_size=sample_size,
            in_channels=channels,
            out_channels=channels,
            block_out_channels=(8, 16),
            layers_per_block=1,
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
            attention_head_dim=2,
            norm_num_groups=4,
            cross_attention_dim=WIDTH,
            addition_embed_type="text" if text else None,
            addition_embed_type_num_heads=2,
        ),
        seed,
    )


def tiny_autoencoder() -> AutoencoderKL:
    """Return an autoencoder of 16x16 images into 4 channels of 8x8."""
    return seeded(
        lambda: AutoencoderKL(
            block_out_channels=(4, 8),
            down_block_types=("DownEncoderBlock2D",) * 2,
            up_block_types=("UpDecoderBlock2D",) * 2,
            norm_num_groups=4,
            scaling_factor=0.5,
        )
    )


def tiny_text(
    kind: str = "bert", length: int = 8, words: tuple[str, ...] = WORDS, width: int = WIDTH
) -> tuple:
    """Return (tokenizer, encoder): WordPiece and BERT over `words`, or byte-level BPE and CLIP."""
    small = {
        "hidden_size": width,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "intermediate_size": 32,
    }
    if kind == "bert":
        tokens = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *words]
        tokenizer = BertTokenizer(
            vocab={token: i for i, token in enumerate(tokens)}, model_max_length=length
        )
        config = BertConfig(vocab_size=len(tokens), max_position_embeddings=length, **small)
        return tokenizer, seeded(lambda: BertModel(config))
    letters = string.ascii_lowercase + string.digits + string.punctuation
    tokens = [
        *letters,
        *(letter + "</w>" for letter in letters),
        "<|startoftext|>",
        "<|endoftext|>",
    ]
    tokenizer = CLIPTokenizer(
        vocab={token: i for i, token in enumerate(tokens)}, merges=[], model_max_length=length
    )
    config = CLIPTextConfig(
        vocab_size=len(tokens),
        max_position_embeddings=length,
        bos_token_id=len(tokens) - 2,
        eos_token_id=len(tokens) - 1,
        pad_token_id=len(tokens) - 1,
        **small,
    )
    return tokenizer, seeded(lambda: CLIPTextModel(config))


def tiny_pipeline(
    kind: str = "bert",
    text: bool = True,
    patch_size: int | None = None,
    sample_size: int | tuple = 8,
    scheduler=None,
    quiet: bool = True,
    **config,
) -> TextToImagePipeline:
    """Return a pipeline of 8x8 pixels or patches; config: caption_length, caption_dropout, w."""
    tokenizer, encoder = tiny_text(kind)
    vae = None if patch_size is None else PatchAutoencoder(patch_size)
    unet = tiny_unet(3 * (patch_size or 1) ** 2, sample_size, text)
    pipe = TextToImagePipeline(
        unet,
        scheduler or DDPMScheduler(timestep_spacing="trailing"),
        encoder,
        tokenizer,
        vae,
        **config,
    )
    pipe.set_progress_bar_config(disable=quiet)
    return pipe


def tiny_clip(folder, sign=1):
    """Save a random CLIP model as on the Hub and return its folder; sign -1 inverts images."""
    tokenizer, encoder = tiny_text("clip")
    small = {
        "hidden_size": WIDTH,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "intermediate_size": 32,
    }
    config = CLIPConfig(
        text_config=encoder.config.to_dict(),
        vision_config={**small, "image_size": 32, "patch_size": 8},
        projection_dim=8,
    )
    network = seeded(lambda: CLIPModel(config))
    network.visual_projection.weight.data *= sign
    for part in (
        network,
        tokenizer,
        CLIPImageProcessorPil(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32}),
    ):
        part.save_pretrained(folder)
    return folder

"""LoRA runs: only the adapter trains, and stock diffusers and this package agree on it."""

import re

import numpy as np
import peft
import pytest
import torch
from diffusers import StableDiffusionPipeline
from finetuning import LORA, ours, quiet, sample, stock
from safetensors import safe_open
from safetensors.torch import load_file
from tiny import tiny_unet
from training_runs import UNET_FILE, killed_after, log, same, train

from pipeline.config import Config, ConfigError, LoraConfig, TrainConfig, load
from pipeline.config import load_file as load_config
from pipeline.models import loading, lora
from pipeline.runs.folder import ADAPTER_FILE, RunFolder


def test_train_saves_the_adapter_alone(adapted, base):
    (file,) = (adapted / "lora").iterdir()
    assert not (adapted / "pipeline").exists()
    assert RunFolder(adapted).finished
    checkpoint = adapted / "checkpoints" / "4" / "lora"
    assert [path.name for path in checkpoint.iterdir()] == [file.name]
    assert file.stat().st_size < 0.2 * (base / UNET_FILE).stat().st_size
    tensors = load_file(file)
    assert all(name.startswith("unet.") and ".lora_" in name for name in tensors)
    # B starts at zero and has moved.
    assert any(value.any() for name, value in tensors.items() if "lora_B" in name)
    with safe_open(file, "pt") as opened:
        metadata = opened.metadata()["lora_adapter_metadata"].replace("\n", " ")
    assert '"unet.lora_alpha": 6' in metadata


def test_adapter_samples_alike_in_stock_diffusers(adapted, base):
    theirs, mine = sample(stock(base, adapted / "lora")), sample(ours(adapted))
    assert np.abs(theirs - mine).max() < 1e-4
    assert np.abs(mine - sample(ours(base))).max() > 1e-3
    assert np.abs(sample(ours(adapted), guidance_scale=8.0) - mine).max() > 1e-3


def test_card_usage_runs_in_stock_diffusers(adapted):
    (lines,) = re.findall(r"```python\n(.*?)```", RunFolder(adapted).card.read_text(), re.S)
    assert "guidance_scale=3)" in lines  # 1 + the w of its settings
    exec(lines, names := {})
    assert type(names["pipe"]) is StableDiffusionPipeline
    assert names["pipe"].get_list_adapters()


def test_load_lora_weights_reads_files_of_stock_diffusers(base, tmp_path):
    maker = stock(base)
    targets = {"target_modules": ["to_q", "to_v"], "init_lora_weights": False}
    maker.unet.add_adapter(peft.LoraConfig(r=2, lora_alpha=5, **targets))
    StableDiffusionPipeline.save_lora_weights(
        tmp_path,
        unet_lora_layers=peft.get_peft_model_state_dict(maker.unet),
        unet_lora_adapter_metadata=maker.unet.peft_config["default"].to_dict(),
    )
    mine = ours(base)
    mine.load_lora_weights(tmp_path)
    assert np.abs(sample(mine) - sample(maker)).max() < 1e-4


def test_fuse_lora_changes_nothing_and_unload_restores(adapted, base):
    pipe, plain = ours(adapted), sample(ours(base))
    loose = sample(pipe)
    pipe.fuse_lora()
    assert np.abs(sample(pipe) - loose).max() < 1e-4
    pipe.unfuse_lora()
    pipe.unload_lora_weights()
    assert np.abs(sample(pipe) - plain).max() < 1e-5 < np.abs(loose - plain).max()


def test_resume_of_lora_ends_in_the_same_bytes(tuning, adapted, tmp_path):
    run = killed_after(2, adapted, tmp_path)
    assert "resuming from step 2" in train(tuning, tmp_path, *LORA).stdout
    assert same(*(load_file(folder / "lora" / ADAPTER_FILE) for folder in (run, adapted)))
    assert log(run) == log(adapted)
    assert "is finished at step 4" in train(tuning, tmp_path, *LORA).stdout


def test_load_checkpoint_of_lora_samples_as_the_run(adapted):
    checkpoint = quiet(loading.load_checkpoint(RunFolder(adapted), 4))
    finished = quiet(loading.load_pipeline(adapted))
    assert finished.config.w == checkpoint.config.w == 2
    assert finished.config.caption_dropout == checkpoint.config.caption_dropout
    # Its own is the base model's, as in stock diffusers; the checkpoint's is the run's.
    finished.scheduler = checkpoint.scheduler
    assert np.abs(sample(checkpoint) - sample(finished)).max() < 1e-5


def test_load_refuses_lora_settings_without_their_method(tmp_path):
    """Except in a run that is there already."""
    with pytest.raises(ConfigError, match=r"lora\.rank"):
        load(["--lora.rank", "16"])
    (tmp_path / "config.yaml").write_text(Config(lora=LoraConfig(rank=16)).to_yaml())
    assert load_config(tmp_path / "config.yaml").lora.rank == 16


def test_problems_of_lora_without_a_base_model():
    problems = Config(train=TrainConfig(method="lora")).problems()
    assert any("train.method lora" in problem for problem in problems)


def test_add_adapter_starts_at_the_base_network():
    x, t, states = torch.randn(1, 3, 8, 8), torch.tensor([5]), torch.randn(1, 8, 16)
    network = tiny_unet()
    with torch.no_grad():
        before = network(x, t, states).sample
        lora.add_adapter(network, LoraConfig())
        assert torch.equal(network(x, t, states).sample, before)
    trainable = [name for name, weight in network.named_parameters() if weight.requires_grad]
    assert trainable
    assert all("lora_" in name for name in trainable)
    with pytest.raises(ConfigError, match=r"lora\.targets"):
        lora.add_adapter(tiny_unet(), LoraConfig(targets=("nothing",)))

"""Adapters change nothing at first, survive a round trip, and name unknown layers."""

import logging

import pytest
import torch
from tiny import WIDTH, tiny_pipeline, tiny_unet

from pipeline.config import ConfigError, LoraConfig
from pipeline.models import build, lora
from pipeline.runs.folder import ADAPTER_FILE


def predict(network):
    generator = torch.Generator().manual_seed(0)
    x_t = torch.randn(2, 3, 8, 8, generator=generator)
    captions = torch.randn(2, 4, WIDTH, generator=generator)
    with torch.no_grad():
        return network(x_t, torch.tensor([3, 7]), captions, return_dict=False)[0]


def test_add_adapter_freezes_the_network_and_changes_nothing():
    network = tiny_unet()
    before = predict(network)
    adapted = lora.add_adapter(network, LoraConfig(rank=2))
    assert torch.equal(predict(adapted), before)
    trainable = {name for name, weight in adapted.named_parameters() if weight.requires_grad}
    assert trainable and all(".lora_" in name for name in trainable)


@pytest.mark.parametrize(("target", "known"), [("to_kk", "to_k"), ("norm1", "norm1")])
def test_add_adapter_refuses_layers_it_cannot_adapt(target, known):
    with pytest.raises(ConfigError, match=f"{target}.*{known}|{target} cannot be adapted"):
        lora.add_adapter(tiny_unet(), LoraConfig(targets=("to_q", target)))


def test_save_adapter_and_load_adapter_weights_round_trip(tmp_path):
    trained = lora.add_adapter(tiny_unet(), LoraConfig(rank=2))
    with torch.no_grad():
        for weight in build.trainable_parameters(trained):
            weight.normal_(generator=torch.Generator().manual_seed(weight.numel()))
    lora.save_adapter(trained.to(memory_format=torch.channels_last), tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == [ADAPTER_FILE]
    fresh = lora.add_adapter(tiny_unet(), LoraConfig(rank=2))
    lora.load_adapter_weights(fresh, tmp_path)
    assert torch.allclose(predict(fresh), predict(trained), atol=1e-6)


def test_load_lora_weights_of_a_network_alone_warns_of_nothing(tmp_path, caplog):
    pipe = tiny_pipeline()
    before = predict(pipe.unet)
    lora.save_adapter(lora.add_adapter(tiny_unet(), LoraConfig(rank=2)), tmp_path)
    logger = logging.getLogger("diffusers")
    logger.addHandler(caplog.handler)
    try:
        pipe.load_lora_weights(str(tmp_path), use_safetensors=True)
    finally:
        logger.removeHandler(caplog.handler)
    assert not caplog.messages
    assert pipe.get_list_adapters() == {"unet": ["default_0"]}
    assert torch.allclose(predict(pipe.unet), before, atol=1e-6)

"""Text encoders are frozen, run no foreign code, and the embedded one has the upstream weights."""

import pytest
import torch

from pipeline.config import ConfigError, ModelConfig
from pipeline.models import text_encoders


def test_minilm_folder_checks_the_upstream_hash(tmp_path, monkeypatch):
    assert (text_encoders.minilm_folder() / "config.json").exists()
    package = tmp_path / text_encoders.MINILM_PACKAGE
    (package / "model").mkdir(parents=True)
    (package / "__init__.py").write_text("raise SystemExit('package code must not run')")
    (package / "model" / "model.safetensors").write_bytes(b"other weights")
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises(ConfigError, match=f"{package}.*53aa51172d14"):
        text_encoders.minilm_folder()


def test_load_text_encoder_freezes_and_separates_captions():
    tokenizer, encoder = text_encoders.load_text_encoder("minilm")
    assert not any(weight.requires_grad for weight in encoder.parameters())
    assert not encoder.training

    def embed(caption):
        return encoder(**tokenizer(caption, return_tensors="pt")).last_hidden_state.mean(1)[0]

    dog, puppy, market = map(embed, ("a small dog", "a puppy", "the stock market"))
    assert torch.cosine_similarity(dog, puppy, 0) > 0.6
    assert torch.cosine_similarity(dog, market, 0) < 0.4


def test_load_text_encoder_reports_a_missing_folder():
    with pytest.raises(ConfigError, match=r"model\.text_encoder './no-such-folder'"):
        text_encoders.load_text_encoder("./no-such-folder")


def test_load_text_encoder_refuses_foreign_code(tmp_path, monkeypatch):
    """Without the option, transformers would ask at a terminal whether to run it."""
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("it asked"))
    config = '{"model_type": "bespoke", "auto_map": {"AutoConfig": "code.Config"}}'
    (tmp_path / "config.json").write_text(config)
    (tmp_path / "code.py").write_text("raise SystemExit('it ran')")
    with pytest.raises(ConfigError, match=str(tmp_path)):
        text_encoders.load_text_encoder(str(tmp_path))


def test_fit_whitening_is_off_by_default():
    states = torch.randn(4, 3, 8, generator=torch.Generator().manual_seed(0))
    assert text_encoders.fit_whitening(ModelConfig(), states) is None
    whitening = text_encoders.fit_whitening(ModelConfig(whitening=0.1), states)
    assert whitening(states).flatten(0, 1).mean(0).abs().max() < 1e-5


def test_load_whitening_reads_a_checkpoints_own(tmp_path):
    assert text_encoders.load_whitening(tmp_path) is None
    states = torch.randn(4, 3, 8, generator=torch.Generator().manual_seed(0))
    fitted = text_encoders.fit_whitening(ModelConfig(whitening=0.1), states)
    fitted.save_pretrained(tmp_path / "whitening")
    assert torch.equal(text_encoders.load_whitening(tmp_path)(states), fitted(states))

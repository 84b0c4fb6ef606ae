"""Models of other people: no code of theirs runs, and what cannot be loaded is one message."""

import json

from hub_world import (
    PICKLE,
    ROOT,
    assert_same_images,
    check_no_pickle_is_requested,
    check_revision_is_kept,
    check_shards_are_replaced,
    folder_files,
)


def test_load_pipeline_takes_a_name_on_the_hub(owner, pushed, expected):
    owner(f"pipe = load_pipeline({pushed!r})")
    assert_same_images(owner.images(), expected)
    code, output = owner.command(
        "sample", pushed, "red heart", "--steps", 2, "--device", "cpu", "-o", "cat.png"
    )
    assert code == 0 and output.endswith("cat.png")
    assert (owner.cwd / "cat.png").is_file()
    owner(f"loaded = TextToImagePipeline.from_pretrained({pushed!r})")
    owner("assert type(loaded.vae).__module__ == 'pipeline.diffusion.patches'")
    owner(f"assert loaded.name_or_path == {pushed!r}")


def test_load_pipeline_neither_downloads_nor_runs_code(hub, owner, pushed):
    check_no_pickle_is_requested(hub, owner, pushed)


def test_pull_copies_no_code_and_no_pickles(hub, owner, pushed):
    mallory = check_no_pickle_is_requested(hub, owner, pushed)
    assert owner.command("pull", mallory, "pulled")[0] == 0
    pulled = folder_files(owner.cwd / "pulled")
    assert not [path for path in pulled if path.endswith((".py", ".bin"))]
    owner("load_pipeline('pulled')")
    code, output = owner.command("pull", mallory, "pulled")
    assert code == 1 and output.startswith("error: pulled exists")
    # Another tool may have put the code into the cache.
    owner(f"assert (Path(snapshot_download({mallory!r})) / 'pipeline.py').exists()")
    owner(f"pull({mallory!r}, Path('again'))")
    assert folder_files(owner.cwd / "again").keys() == pulled.keys()
    owner(f"push({mallory!r}, 'tester/republished')")
    ours = (ROOT / "pipeline" / "diffusion" / "text_to_image.py").read_bytes()
    assert hub.files("models", "tester/republished")["pipeline.py"] == ours
    assert not (owner.cwd / "ran").exists()


def test_download_model_keeps_to_a_revision(hub, owner, pushed):
    check_revision_is_kept(hub, owner, pushed)
    old, new = list(hub.repos["models", "mallory/moving"].commits)[-2:]
    assert hub.repos["models", "mallory/moving"].refs["main"] == new
    owner(f"pipe = TextToImagePipeline.from_pretrained('mallory/moving', revision={old!r})")
    owner("assert pipe.config.w == 1.0")
    space = ("space", "tester/old-demo", "--model", f"mallory/moving@{old}")
    assert owner.command(*space)[0] == 0
    pinned = hub.files("spaces", "tester/old-demo")["model.txt"].decode()
    assert pinned == f"mallory/moving@{old}\n"


def test_download_model_needs_no_network_when_cached(hub, owner, pushed):
    owner(f"load_pipeline({pushed!r})")
    hub.requests.clear()
    owner("constants.HF_HUB_OFFLINE = True")
    try:
        owner(f"load_pipeline({pushed!r})")
    finally:
        owner("constants.HF_HUB_OFFLINE = False")
    assert hub.requests == []


def test_download_model_explains_what_cannot_be_had(hub, owner, pushed):
    files = hub.files("models", pushed)
    index = json.loads(files["model_index.json"])
    foreign = json.dumps(index | {"scheduler": ["mine", "Mine"]}).encode()
    pickled = {
        path.replace(".safetensors", ".bin"): PICKLE if path.endswith(".safetensors") else content
        for path, content in files.items()
    }
    hub.add("mallory/private", files, private=True)
    hub.add("mallory/gated", files, gated=True)
    hub.add("mallory/pickled", pickled)
    hub.add("mallory/strange", files | {"model_index.json": foreign})
    hub.add("mallory/corrupt", files | {"model_index.json": b"{"})
    hub.add("mallory/empty", {"README.md": b"nothing"})
    for model, culprit in {
        "mallory/private": "mallory/private is not on the Hub, or private",
        "mallory/nothing": "mallory/nothing is not on the Hub, or private",
        "mallory/gated": "mallory/gated is gated",
        "mallory/pickled": "mallory/pickled has no safetensors",
        "mallory/strange": "'Mine' of 'mine'",
        "mallory/corrupt": "is corrupt",
        "mallory/empty": "mallory/empty has no model_index.json",
        f"{pushed}@no-such-branch": f"{pushed}@no-such-branch has no such revision",
        "mallory/no--name": "mallory/no--name does not exist",
    }.items():
        message = owner.error(f"load_pipeline({model!r})")
        assert message.startswith("ModelError: ") and culprit in message, message
        assert message.count("\n") == 1
        assert owner.error(f"TextToImagePipeline.from_pretrained({model!r})") == message
    hub.add("mallory/busy", files)
    hub.faults.append(("HEAD", "/mallory/busy/resolve/", 403))
    message = owner.error("load_pipeline('mallory/busy')")
    assert message.startswith("ModelError: mallory/busy is not in the cache")


# ---- variants


def test_from_pretrained_downloads_a_variant_on_request(owner, half):
    owner(f"pipe = TextToImagePipeline.from_pretrained({half!r}, variant='fp16')")
    owner("images = pipe('cat', seed=0, num_inference_steps=2, output_type='np').images")
    owner("assert images.shape == (1, 8, 8, 3)")


def test_require_plain_weights_names_the_variant(owner, half, place):
    for model in (str(place / "half"), half):
        message = owner.error(f"load_pipeline({model!r})")
        assert message.startswith(f"VariantError: {model} has only fp16 weights"), message
        assert f"from_pretrained({model!r}, variant='fp16')" in message
    message = owner.error(f"push_space('tester/broken', {half!r})")
    assert message.startswith(f"VariantError: {half} has only fp16 weights")


def test_push_to_hub_replaces_shards(hub, owner, pushed):
    check_shards_are_replaced(hub, owner, pushed)


def test_push_to_hub_replaces_shards_of_its_own_variant(hub, owner, half):
    owner(
        f"pipe = TextToImagePipeline.from_pretrained({half!r}, variant='fp16')\n"
        "options = {'variant': 'fp16', 'max_shard_size': '100KB', 'push_to_hub': True}\n"
        "pipe.save_pretrained('shards', repo_id='tester/shards', **options)"
    )
    saved = folder_files(owner.cwd / "shards").keys()
    assert saved == hub.files("models", "tester/shards").keys() - {"README.md"}
    assert not hub.repos["models", "tester/shards"].private
    unet = {name for name in saved if name.startswith("unet/") and ".fp16" in name}
    assert len([name for name in unet if name.endswith(".safetensors")]) > 1
    # An index of shards would win over the single file of the second push.
    owner("pipe.push_to_hub('tester/shards', max_shard_size='100KB')")
    owner("pipe.push_to_hub('tester/shards')")
    now = hub.files("models", "tester/shards").keys()
    assert {name for name in now - saved if name.startswith("unet/")} == {
        "unet/diffusion_pytorch_model.safetensors"
    }
    assert saved < now and "README.md" in now, "the variant is another model's"


def test_push_to_hub_has_the_variant_and_no_pickles(hub, owner, half):
    owner(f"pipe = TextToImagePipeline.from_pretrained({half!r}, variant='fp16')")
    owner("pipe.push_to_hub('tester/variant', variant='fp16', private=True)")
    assert hub.repos["models", "tester/variant"].private
    files = hub.files("models", "tester/variant")
    assert "unet/diffusion_pytorch_model.fp16.safetensors" in files
    assert files["README.md"].count(b"use_safetensors=True, variant='fp16')") == 2
    message = owner.error("pipe.push_to_hub('tester/variant', safe_serialization=False)")
    assert message.startswith("ValueError") and "safe_serialization" in message

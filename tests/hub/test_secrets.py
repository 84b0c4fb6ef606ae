"""No token is printed, stored or shared, and breaks of the promises of sharing are noticed."""

import pytest
from hub_world import (
    CANARY,
    check_no_pickle_is_requested,
    check_revision_is_kept,
    check_shards_are_replaced,
    check_token_is_hidden,
)

# What somebody could get wrong, and the check that must fail then.
BREAKS = {
    "pickles are downloaded": (
        "mock.patch.object(trusted, 'COMPONENT_FILES', ('*.json', '*.safetensors', '*.bin'))",
        check_no_pickle_is_requested,
    ),
    "the revision is dropped": (
        "mock.patch.object(trusted, 'parse_repo_id', lambda m: (m.partition('@')[0], None))",
        check_revision_is_kept,
    ),
    "stale shards are left": (
        "mock.patch.object(HfApi, 'list_repo_files', lambda *args, **options: [])",
        check_shards_are_replaced,
    ),
    "the token is printed": (
        "mock.patch.object(HubConfig, '__repr__', lambda self: f'HubConfig({self.token})')",
        check_token_is_hidden,
    ),
}


def test_no_token_is_printed_stored_or_shared(hub, owner, outsider, place, run):
    message = owner.error(f"push({str(run.folder)!r}, 'somebody/else')")
    assert "somebody/else failed: status 403" in message
    assert CANARY not in "".join(owner.outputs + outsider.outputs)
    for path in (path for path in place.rglob("*") if path.is_file()):
        assert CANARY.encode() not in path.read_bytes(), path
    for name, repo in hub.repos.items():
        for tree in repo.commits.values():
            leaks = [path for path, (content, _) in tree.items() if CANARY.encode() in content]
            assert not leaks, name
    check_token_is_hidden(hub, owner, None)


@pytest.mark.parametrize("name", BREAKS)
def test_semantic_breaks_are_noticed(name, hub, owner, pushed):
    patch, check = BREAKS[name]
    owner("from unittest import mock\nfrom huggingface_hub import HfApi")
    owner(f"from pipeline.models import trusted\npatch = {patch}\npatch.start()")
    try:
        with pytest.raises(AssertionError):
            check(hub, owner, pushed)
    finally:
        owner("patch.stop()")
    check(hub, owner, pushed)

"""A challenger is published beside the pair, under a name of its own, if it can score the pair's requests."""

import pytest

from gr_platform import storage
from gr_platform.errors import UserError
from serving import repository
from serving.repository import ServingOptions, publish


def changed(**declared):
    def change(folder, facts):
        facts["declaration"] = facts["declaration"] | declared

    return change


@pytest.fixture(scope="session")
def challenger(tmp_path_factory, random_bundle):
    """A younger ranking model, which knows more items."""
    return random_bundle(tmp_path_factory.mktemp("challenger") / "ranking", "ranking", num_items=220, seed=3)


def test_the_challenger_is_one_more_model_of_the_rankers_template(tmp_path, pair, challenger):
    published = publish(
        tmp_path, pair["retrieval"], pair["ranking"], ServingOptions(shadow_share=0.5), shadow=challenger
    )
    assert repository.ensure_repository(tmp_path) == ("gr_ranker_shadow", *repository.MODELS)
    shadow, ranker = (published.folder / name for name in ("gr_ranker_shadow", "gr_ranker"))
    assert (shadow / "1" / "model.py").read_bytes() == (ranker / "1" / "model.py").read_bytes()
    digest = storage.read_manifest(challenger).facts["model_digest"]
    config = (shadow / "config.pbtxt").read_text()
    assert 'name: "gr_ranker_shadow"' in config
    assert f'key: "model_digest" value: {{ string_value: "{digest}" }}' in config
    recommender = (published.folder / "gr_recommender" / "config.pbtxt").read_text()
    assert f'key: "shadow_digest" value: {{ string_value: "{digest}" }}' in recommender
    assert 'key: "shadow_share" value: { string_value: "0.5" }' in recommender
    assert storage.read_manifest(shadow / "1" / "bundle").digest == storage.read_manifest(challenger).digest


def test_without_a_challenger_there_is_no_such_model(tmp_path, pair, challenger):
    publish(tmp_path, pair["retrieval"], pair["ranking"], shadow=challenger)
    again = publish(tmp_path, pair["retrieval"], pair["ranking"])
    assert again.changed
    assert repository.ensure_repository(tmp_path) == repository.MODELS
    assert (
        'key: "shadow_digest" value: { string_value: "" }'
        in (again.folder / "gr_recommender" / "config.pbtxt").read_text()
    )


def test_a_challenger_that_cannot_score_the_pairs_requests_is_refused(tmp_path, pair, rewritten):
    with pytest.raises(UserError, match="is a retrieval bundle, a shadow is a ranking bundle"):
        publish(tmp_path, pair["retrieval"], pair["ranking"], shadow=pair["retrieval"])
    with pytest.raises(UserError, match="is of data set elsewhere, the served models of random"):
        publish(
            tmp_path, pair["retrieval"], pair["ranking"], shadow=rewritten(pair["ranking"], changed(name="elsewhere"))
        )
    fewer = rewritten(
        pair["ranking"], changed(actions=["view", "share", "like"], tasks={"like": ["like"]}, positives=["view"])
    )
    with pytest.raises(UserError, match="lacks actions of the served models"):
        publish(tmp_path, pair["retrieval"], pair["ranking"], shadow=fewer)
    assert repository.current(tmp_path) is None


@pytest.mark.parametrize("options", [{"shadow_share": 1.5}, {"shadow_share": -0.1}, {"max_in_flight": 0}])
def test_options_out_of_range_are_refused(options):
    with pytest.raises(ValueError, match=next(iter(options))):
        ServingOptions(**options)

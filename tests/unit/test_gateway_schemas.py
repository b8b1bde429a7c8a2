"""What the gateway takes and gives, without a network."""

import math
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from common.messages.cluster import Member, MemberState, Service, VideoModelInfo
from common.messages.failures import Failure, Stage
from common.messages.video import VideoProgress, VideoRecord, VideoRequest, VideoState
from gateway import catalogue, openapi, present
from gateway.bodies import parse_fields
from gateway.desk import new_video_id, place_of
from gateway.errors import ApiError
from gateway.ranges import Unsatisfiable, byte_range
from gateway.schemas import CreateVideo
from gateway.table import ROUTES
from gateway.validation import resolve, seconds_text

MODEL = VideoModelInfo(
    name="demo",
    sizes=((64, 64), (96, 64)),
    frames=(8, 16, 17),
    fps=(4, 24),
    steps=(1, 50),
    guidance_scale=(0.0, 20.0),
    max_prompt_tokens=32,
    default_size=(64, 64),
    default_frames=16,
    default_fps=8,
    default_steps=10,
    default_guidance_scale=7.0,
)


def resolved(**fields: Any) -> VideoRequest:
    return resolve(parse_fields(CreateVideo, {"prompt": "a ball"} | fields), MODEL, random_seed=42, now_s=1000.0)


def refused(**fields: Any) -> ApiError:
    with pytest.raises(ApiError) as refusal:
        resolved(**fields)
    assert refusal.value.status == 400
    return refusal.value


# --- defaults and limits --------------------------------------------------------------------------------------------


def test_what_is_left_out_comes_from_the_model() -> None:
    assert resolved() == VideoRequest(
        model="demo", prompt="a ball", width=64, height=64, frames=16, fps=8, steps=10, guidance_scale=7.0, seed=42
    )


def test_everything_asked_for_is_kept() -> None:
    request = resolved(size="96x64", frames=8, fps=12, steps=3, guidance_scale=1, seed=0, negative_prompt="rain")
    assert (request.width, request.height, request.frames, request.fps) == (96, 64, 8, 12)
    assert (request.steps, request.guidance_scale, request.seed, request.negative_prompt) == (3, 1.0, 0, "rain")


def test_priority_and_deadline_are_kept_and_shown() -> None:
    request = resolved(priority=-7, deadline=90.5)
    assert (request.priority, request.deadline_s) == (-7, 1090.5), "the deadline counts from now, which is 1000"
    assert (resolved().priority, resolved().deadline_s) == (0, None)
    asked = record(VideoState.QUEUED).model_copy(update={"request": request})
    shown = present.video(asked, None)
    assert (shown.priority, shown.deadline_at) == (-7, 1090.5)
    assert present.video(record(VideoState.QUEUED), None).deadline_at is None


def test_a_record_shows_the_idea_and_what_was_made_of_it() -> None:
    stored = record(VideoState.QUEUED)
    expanded = stored.request.model_copy(update={"expanded_prompt": "a red ball going right"})
    shown = present.video(stored.model_copy(update={"request": expanded}), None)
    assert (shown.prompt, shown.expanded_prompt) == (stored.request.prompt, "a red ball going right")
    assert expanded.caption == "a red ball going right"
    assert present.video(stored, None).expanded_prompt is None
    assert stored.request.caption == stored.request.prompt
    assert b"expanded_prompt" not in stored.pack(), "what is not expanded reads as it did before there was the field"


def test_a_caption_that_is_too_long_is_no_fault_of_the_prompt() -> None:
    failed = record(VideoState.FAILED).model_copy(
        update={"failure": Failure(stage=Stage.ENCODER, code="prompt_too_long", message="too long")}
    )
    expanded = failed.request.model_copy(update={"expanded_prompt": "a very long caption"})
    for request, param in ((failed.request, "prompt"), (expanded, "expand_prompt")):
        error = present.error(failed.model_copy(update={"request": request}))
        assert error is not None and error.param == param


def test_the_document_says_what_priority_and_deadline_may_be() -> None:
    fields = openapi.describe(ROUTES, "Triptych", "1")["components"]["schemas"]["CreateVideo"]["properties"]
    assert (fields["priority"]["minimum"], fields["priority"]["maximum"]) == (-100, 100)
    assert "the higher goes first" in fields["priority"]["description"]
    assert fields["deadline"]["exclusiveMinimum"] == 0 and "Seconds from now" in fields["deadline"]["description"]


def test_null_is_the_same_as_left_out() -> None:
    assert resolved(size=None, seed=None, seconds=None) == resolved()


@pytest.mark.parametrize("size", ["96x64", "96X64", "96×64", " 96 x 64 ", "96*64"])
def test_sizes_are_read_as_people_write_them(size: str) -> None:
    request = resolved(size=size)
    assert (request.width, request.height) == (96, 64)


@pytest.mark.parametrize(
    ("seconds", "fps", "frames"),
    [("2", None, 16), (2, None, 16), (2.0, 8, 16), ("1", 8, 8), ("1.0", 17, 17), (0.708333, 24, 17), ("2s", 8, 16)],
)
def test_seconds_and_fps_determine_the_frames(seconds: object, fps: int | None, frames: int) -> None:
    assert resolved(seconds=seconds, fps=fps).frames == frames


@given(frames=st.integers(1, 500), fps=st.integers(1, 120))
def test_the_duration_reported_gives_the_same_frames_when_sent_back(frames: int, fps: int) -> None:
    assert round(float(seconds_text(frames, fps)) * fps) == frames


def test_frames_and_seconds_that_agree_are_fine() -> None:
    assert resolved(frames=16, seconds="2").frames == 16


def test_frames_and_seconds_that_contradict_are_refused() -> None:
    error = refused(frames=8, seconds="2")
    assert (error.param, error.code) == ("seconds", "contradictory_fields")
    assert "Leave one of the two out" in error.message


def test_an_impossible_duration_names_the_possible_ones_and_the_fps_that_would_do() -> None:
    error = refused(seconds="4")
    assert (error.param, error.code) == ("seconds", "unsupported_seconds")
    assert "1 s (8 frames), 2 s (16 frames), 2.125 s (17 frames)" in error.message
    assert "fps 4" in error.message


@pytest.mark.parametrize(
    ("fields", "param", "says"),
    [
        ({"size": "1280x720"}, "size", "64x64, 96x64"),
        ({"size": "64"}, "size", "WIDTHxHEIGHT"),
        ({"frames": 15}, "frames", "8, 16, 17"),
        ({"fps": 60}, "fps", "from 4 to 24"),
        ({"steps": 0}, "steps", "from 1 to 50"),
        ({"guidance_scale": -0.5}, "guidance_scale", "from 0 to 20"),
        ({"guidance_scale": math.inf}, "guidance_scale", "finite"),
        ({"guidance_scale": math.nan}, "guidance_scale", "finite"),
        ({"seed": -1}, "seed", "greater than or equal to 0"),
        ({"seed": 2**53}, "seed", "less than or equal to"),
        ({"seed": True}, "seed", "an integer, not true or false"),
        ({"seed": "7"}, "seed", "an integer, not the text '7'"),
        ({"steps": 2.5}, "steps", "an integer, not the number 2.5"),
        ({"prompt": ""}, "prompt", "empty"),
        ({"prompt": " \n"}, "prompt", "empty"),
        ({"prompt": "x" * 513}, "prompt", "513 characters"),
        ({"prompt": None}, "prompt", "missing"),
        ({"prompt": ["x"]}, "prompt", "a string, not a list"),
        ({"prompt": "\ud800"}, "prompt", "lone surrogate"),
        ({"negative_prompt": "x" * 513}, "negative_prompt", "513 characters"),
        ({"seconds": "soon"}, "seconds", "a number"),
        ({"seconds": 0}, "seconds", "above 0"),
        ({"seconds": -1}, "seconds", "above 0"),
        ({"seconds": math.inf}, "seconds", "above 0"),
        ({"seconds": 1e300}, "seconds", "above 0"),
        ({"seconds": True}, "seconds", "a string or an integer or a number"),
        ({"seconds": 10**400}, "seconds", "above 0"),
        ({"steps": 10**400}, "steps", "from 1 to 50"),
        ({"priority": 101}, "priority", "from -100 to 100, not 101; the higher goes first"),
        ({"priority": -(10**400)}, "priority", "from -100 to 100"),
        ({"priority": 1.5}, "priority", "an integer, not the number 1.5"),
        ({"priority": "high"}, "priority", "an integer, not the text 'high'"),
        ({"priority": True}, "priority", "an integer, not true or false"),
        ({"deadline": 0}, "deadline", "seconds from now, above 0 and at most 31,536,000 (a year), not 0."),
        ({"deadline": -60}, "deadline", "Leave it out where there is none"),
        ({"deadline": 1e300}, "deadline", "at most 31,536,000"),
        ({"deadline": math.inf}, "deadline", "finite"),
        ({"deadline": "soon"}, "deadline", "a number, not the text 'soon'"),
        ({"priorty": 1}, "priorty", "Did you mean 'priority'?"),
        ({"sise": "64x64"}, "sise", "Did you mean 'size'?"),
        ({"zzz": 1}, "zzz", "Known are prompt"),
    ],
)
def test_what_the_model_cannot_do_is_refused_by_name_with_what_it_can(
    fields: dict[str, Any], param: str, says: str
) -> None:
    error = refused(**fields)
    assert error.param == param
    assert says in error.message
    assert error.kind == "invalid_request_error"


def test_all_unknown_fields_are_named() -> None:
    assert "'promt', 'sise'" in refused(promt="x", sise="y").message


@given(fields=st.dictionaries(st.sampled_from(list(CreateVideo.model_fields)), st.from_type(object), max_size=4))
def test_no_field_value_whatever_breaks_the_validation(fields: dict[str, Any]) -> None:
    try:
        request = resolve(parse_fields(CreateVideo, fields), MODEL, random_seed=1, now_s=1000.0)
    except ApiError as error:
        assert error.status == 400
        assert error.message
    else:
        VideoRequest.unpack(request.pack())


# --- what a client sees ---------------------------------------------------------------------------------------------


def record(state: VideoState, failure: Failure | None = None) -> VideoRecord:
    return VideoRecord(
        job_id="video_1",
        state=state,
        request=resolved(),
        created_at_s=100.9,
        updated_at_s=101.0,
        ended_at_s=160.2 if state.terminal else None,
        failure=failure,
    )


def test_every_state_has_a_status_that_openai_knows() -> None:
    assert {state: present.video(record(state), None).status for state in VideoState} == {
        VideoState.QUEUED: "queued",
        VideoState.ENCODING: "in_progress",
        VideoState.DENOISING: "in_progress",
        VideoState.DECODING: "in_progress",
        VideoState.COMPLETED: "completed",
        VideoState.FAILED: "failed",
        VideoState.CANCELLED: "failed",
    }


def test_a_cancelled_video_says_so_in_its_error() -> None:
    video = present.video(record(VideoState.CANCELLED), None)
    assert video.error is not None
    assert video.error.code == "cancelled"
    assert video.completed_at is None


def test_a_prompt_too_long_for_the_encoder_names_the_prompt() -> None:
    failure = Failure(stage=Stage.ENCODER, code="prompt_too_long", message="40 tokens, at most 32")
    error = present.video(record(VideoState.FAILED, failure), None).error
    assert error is not None
    assert (error.code, error.message, error.param) == ("prompt_too_long", "40 tokens, at most 32", "prompt")


def test_progress_only_grows_over_a_life() -> None:
    stages = [(VideoState.QUEUED, 0), (VideoState.ENCODING, 0)]
    stages += [(VideoState.DENOISING, step) for step in range(11)]
    stages += [(VideoState.DECODING, 0), (VideoState.COMPLETED, 0)]
    bars = []
    for state, step in stages:
        progress = VideoProgress(job_id="video_1", state=state, step=step, steps=10)
        bars.append(present.video(record(state), progress).progress)
    assert bars == sorted(bars)
    assert (bars[0], bars[-1]) == (0, 100)


def test_a_job_that_waits_to_go_on_keeps_its_bar() -> None:
    bars = set()
    for state in (VideoState.DENOISING, VideoState.QUEUED, VideoState.ENCODING):
        progress = VideoProgress(job_id="video_1", state=state, step=6, steps=10)
        bars.add(present.video(record(state), progress).progress)
    assert len(bars) == 1


def test_times_are_whole_seconds_and_the_duration_is_text() -> None:
    video = present.video(record(VideoState.COMPLETED), None)
    assert (video.created_at, video.completed_at, video.seconds, video.size) == (100, 160, "2", "64x64")


# --- ids, ranges, members -------------------------------------------------------------------------------------------


@given(st.integers(0, 2**48 - 1))
def test_an_id_keeps_its_place_in_the_order_of_creation(now_ms: int) -> None:
    video_id = new_video_id(now_ms)
    assert place_of(video_id) == (now_ms / 1000, video_id)


def test_a_foreign_id_has_no_place() -> None:
    assert place_of("video_123") is None


@pytest.mark.parametrize(
    ("header", "expected"),
    [
        (None, None),
        ("bytes=0-3", range(4)),
        ("bytes=4-", range(4, 10)),
        ("bytes=-3", range(7, 10)),
        ("bytes=-30", range(10)),
        ("bytes=5-100", range(5, 10)),
        ("bytes=9-9", range(9, 10)),
        ("bytes=0-1,4-5", None),
        ("bytes=4-2", None),
        ("bytes=-", None),
        ("bytes=a-b", None),
        ("items=0-3", None),
        ("bytes=0-" + "9" * 5000, range(10)),
    ],
)
def test_ranges(header: str | None, expected: range | None) -> None:
    assert byte_range(header, 10) == expected


@pytest.mark.parametrize("header", ["bytes=10-", "bytes=10-20", "bytes=-0"])
def test_ranges_outside_the_file(header: str) -> None:
    with pytest.raises(Unsatisfiable):
        byte_range(header, 10)


def a_member(service: Service, model: str | None = "demo", state: MemberState = MemberState.READY) -> Member:
    info = MODEL.model_copy(update={"name": model}) if model else None
    return Member(
        instance=f"{service}-0",
        incarnation="1",
        service=service,
        state=state,
        host="here",
        pid=1,
        started_at_s=0.0,
        video_model=info,
    )


def test_a_stack_is_complete_with_a_model_that_all_three_services_have() -> None:
    members = [a_member(Service.SCHEDULER, None), *map(a_member, catalogue.VIDEO_SERVICES)]
    assert list(catalogue.complete_models(members)) == ["demo"]
    assert catalogue.missing(members, broker_connected=True) == []


def test_what_is_missing_is_named() -> None:
    members = [a_member(Service.ENCODER), a_member(Service.DIT, state=MemberState.STARTING)]
    assert catalogue.missing(members, broker_connected=False) == ["broker", "scheduler", "dit", "vae"]


def test_services_with_different_models_do_not_make_a_stack() -> None:
    members = [
        a_member(Service.SCHEDULER, None),
        a_member(Service.ENCODER, "one"),
        a_member(Service.DIT, "one"),
        a_member(Service.VAE, "two"),
    ]
    assert catalogue.complete_models(members) == {}
    assert catalogue.missing(members, broker_connected=True) == [
        "a video model that encoder, dit and vae have in common"
    ]


def test_models_stay_on_offer_while_a_worker_restarts() -> None:
    offer = catalogue.Catalogue()
    members = {str(service): a_member(service) for service in catalogue.VIDEO_SERVICES}
    offer.update(members)
    offer.update({name: member for name, member in members.items() if name != "dit"})
    assert list(offer.video_models) == ["demo"]


# --- the interface's description ------------------------------------------------------------------------------------


def references(node: object) -> set[str]:
    if isinstance(node, dict):
        own = {node["$ref"]} if isinstance(node.get("$ref"), str) else set()
        return own.union(*map(references, node.values()))
    return set().union(*map(references, node)) if isinstance(node, list) else set()


def test_the_document_describes_every_route_and_every_reference_leads_somewhere() -> None:
    document = openapi.describe(ROUTES, "Triptych", "1")
    described = {(method.upper(), path) for path, item in document["paths"].items() for method in item}
    assert described == {(route.method, route.path) for route in ROUTES if route.described}
    schemas = {f"#/components/schemas/{name}" for name in document["components"]["schemas"]}
    assert references(document) == schemas


def test_every_path_parameter_is_described() -> None:
    for route in ROUTES:
        if route.described:
            named = {part[1:-1] for part in route.path.split("/") if part.startswith("{")}
            assert named == {parameter.name for parameter in route.parameters if parameter.place == "path"}


def test_operation_ids_are_unique() -> None:
    names = [route.name for route in ROUTES if route.described]
    assert len(names) == len(set(names))

"""Every subject, queue and bucket of the stack, each bound to the one message it carries. Nowhere else names one."""

from dataclasses import dataclass
from typing import Generic, TypeVar

from common.messages import cache, chat, cluster, dispatch, failures, kv_index, mempool, video
from common.messages.base import Message

Request = TypeVar("Request", bound=Message)
Reply = TypeVar("Reply", bound=Message)
Body = TypeVar("Body", bound=Message)


@dataclass(frozen=True)
class RequestSubject(Generic[Request, Reply]):
    """Request and reply. ``{}`` in the pattern stands for the instance that answers."""

    pattern: str
    request: type[Request]
    reply: type[Reply]

    def at(self, *tokens: str) -> str:
        """The subject of one instance."""
        return self.pattern.format(*tokens)


@dataclass(frozen=True)
class EventSubject(Generic[Body]):
    """Published and forgotten: who listens hears it, nobody answers. ``{}`` stands for whom it is about."""

    pattern: str
    body: type[Body]

    def at(self, *tokens: str) -> str:
        return self.pattern.format(*tokens)

    @property
    def all(self) -> str:
        """The subject that hears every one of them."""
        return self.pattern.replace("{}", "*")


@dataclass(frozen=True)
class WorkQueue(Generic[Body]):
    """A durable queue: each message goes to one taker, is kept until acknowledged, and the queue is bounded.

    ``pattern``'s ``{}`` is the job id, which is the deduplication key too.
    """

    name: str
    pattern: str
    body: type[Body]
    max_messages: int

    def at(self, job_id: str) -> str:
        return self.pattern.format(job_id)

    @property
    def all(self) -> str:
        return self.pattern.replace("{}", "*")


@dataclass(frozen=True)
class Bucket(Generic[Body]):
    """A key-value bucket whose every value is a ``body``. Writes are compare-and-set."""

    name: str
    body: type[Body]
    max_bytes: int


@dataclass(frozen=True)
class ObjectBucket:
    """An object store for finished files."""

    name: str
    max_bytes: int


_MB = 1024 * 1024

# A video's way
VIDEO_JOBS = WorkQueue("VIDEO_JOBS", "triptych.jobs.video.{}", video.VideoQueued, max_messages=256)
VIDEO_RECORDS = Bucket("video_records", video.VideoRecord, max_bytes=256 * _MB)
VIDEO_TIMELINES = Bucket("video_timelines", video.VideoTimeline, max_bytes=256 * _MB)
VIDEO_FILES = ObjectBucket("video_files", max_bytes=4096 * _MB)

ENCODE_PROMPT = RequestSubject("triptych.encoder.{}.encode", video.EncodePrompt, video.PromptEncoded)
PROMPTS_SERVED = EventSubject("triptych.encoder.{}.served", video.PromptsServed)
GRANT_LEASE = RequestSubject("triptych.dit.{}.lease", video.Lease, failures.Acknowledged)
REVOKE_LEASE = RequestSubject("triptych.dit.{}.revoke", video.RevokeLease, video.LeasesRevoked)
FIND_LATENT = RequestSubject("triptych.dit.{}.find_latent", video.FindLatent, video.LatentFound)
PARK_JOB = RequestSubject("triptych.dit.{}.park", video.ParkJob, failures.Acknowledged)
DECODE_VIDEO = RequestSubject("triptych.vae.{}.decode", video.DecodeVideo, failures.Acknowledged)
CANCEL_DECODING = RequestSubject("triptych.vae.{}.cancel", video.CancelDecoding, failures.Acknowledged)

# Between DiT workers, so that growing waits for no scheduler.
GROUP_CALLED = EventSubject("triptych.dit.{}.called", video.GroupCalled)

# Workers' reports to the scheduler. The final ones are answered, so that the worker repeats what was not heard.
STEP_FINISHED = EventSubject("triptych.scheduler.step.{}", video.StepFinished)
CHECKPOINT_STORED = EventSubject("triptych.scheduler.checkpoint.{}", video.CheckpointStored)
GROUP_LOST = EventSubject("triptych.scheduler.group_lost.{}", video.GroupLost)
JOB_PARKED = RequestSubject("triptych.scheduler.job_parked", video.JobParked, failures.Acknowledged)
DENOISING_FINISHED = RequestSubject(
    "triptych.scheduler.denoising_finished", video.DenoisingFinished, failures.Acknowledged
)
DECODING_FINISHED = RequestSubject(
    "triptych.scheduler.decoding_finished", video.DecodingFinished, failures.Acknowledged
)
PHASE_FAILED = RequestSubject("triptych.scheduler.phase_failed", video.PhaseFailed, failures.Acknowledged)

VIDEO_PROGRESS = EventSubject("triptych.progress.video.{}", video.VideoProgress)

# A chat's way. Language workers listen at their instance's name, whatever their role.
ROUTE_CHAT = RequestSubject("triptych.scheduler.route_chat", chat.RouteChat, chat.ChatRoute)
CHAT_PREFILLED = EventSubject("triptych.scheduler.chat_prefilled", chat.ChatPrefilled)
CHAT_ENDED = EventSubject("triptych.scheduler.chat_ended", chat.ChatEnded)
CHATS_UNDER_WAY = EventSubject("triptych.scheduler.chats_under_way", chat.ChatsUnderWay)

GENERATE_TOKENS = RequestSubject("triptych.language.{}.generate", chat.GenerateTokens, failures.Acknowledged)
FIND_GENERATION = RequestSubject("triptych.language.{}.find", chat.FindGeneration, chat.GenerationFound)
OFFER_KV = RequestSubject("triptych.language.{}.offer_kv", chat.OfferKV, failures.Acknowledged)
TAKE_OVER = RequestSubject("triptych.language.{}.take_over", chat.TakeOver, failures.Acknowledged)
MATCH_PREFIX = RequestSubject("triptych.language.{}.match", mempool.MatchPrefix, mempool.PrefixMatched)
SEND_PREFIX = RequestSubject("triptych.language.{}.send", mempool.SendPrefix, mempool.PrefixMatched)
MOVE_BLOCKS = RequestSubject("triptych.language.{}.move", mempool.MoveBlocks, mempool.BlocksMoved)
# Heard at most once: what is missed is found out by FIND_GENERATION, or by the next tokens' offset.
CANCEL_GENERATION = EventSubject("triptych.language.{}.cancel", chat.CancelGeneration)
TOKENS_GENERATED = EventSubject("triptych.gateway.{}.tokens", chat.TokensGenerated)

FLIP_ROLE = RequestSubject("triptych.language.{}.flip", cluster.FlipRole, cluster.RoleFlipped)
ROLE_FLIPPED = EventSubject("triptych.language.{}.flipped", cluster.RoleFlipped)

# How decode instances are, said by each and told to all. Heard at most once: the next one says it again.
LOAD_REPORTED = EventSubject("triptych.scheduler.load_reported", dispatch.DecodeLoad)
DECODE_LOADS = EventSubject("triptych.language.decode_loads", dispatch.DecodeLoads)

# What language instances have cached. Heard at most once: what is missed shows with the next change.
INDEX_CHANGED = EventSubject("triptych.scheduler.index_changed", kv_index.IndexChanged)
TELL_INDEX = RequestSubject("triptych.language.{}.tell_index", kv_index.AskIndex, kv_index.IndexTold)
TELL_VIEW = RequestSubject("triptych.scheduler.tell_view", kv_index.AskView, kv_index.ViewTold)

# The cache store
STORE_TENSOR = RequestSubject("triptych.cache_store.store", cache.StoreTensor, cache.TensorStored)
FIND_TENSOR = RequestSubject("triptych.cache_store.find", cache.FindTensor, cache.TensorFound)
DROP_TENSOR = RequestSubject("triptych.cache_store.drop", cache.DropTensor, failures.Acknowledged)
STORE_TENSORS = RequestSubject("triptych.cache_store.store_many", cache.StoreTensors, cache.TensorsStored)
HAVE_TENSORS = RequestSubject("triptych.cache_store.have_many", cache.HaveTensors, cache.TensorsHad)
FIND_TENSORS = RequestSubject("triptych.cache_store.find_many", cache.FindTensors, cache.TensorsFound)
DROP_TENSORS = RequestSubject("triptych.cache_store.drop_many", cache.DropTensors, failures.Acknowledged)

# Between cache stores. What is found here is what this one has, without asking the others.
COPY_TENSOR = RequestSubject("triptych.cache_store.{}.copy", cache.CopyTensor, cache.TensorStored)
DROP_COPY = RequestSubject("triptych.cache_store.{}.drop", cache.DropCopy, failures.Acknowledged)
FIND_COPY = RequestSubject("triptych.cache_store.{}.find", cache.FindTensor, cache.TensorFound)
HAVE_COPIES = RequestSubject("triptych.cache_store.{}.have_many", cache.HaveTensors, cache.TensorsHad)
FIND_COPIES = RequestSubject("triptych.cache_store.{}.find_many", cache.FindTensors, cache.TensorsFound)
ASK_DIGESTS = RequestSubject("triptych.cache_store.{}.digests", cache.AskDigests, cache.Digests)
LIST_BUCKET = RequestSubject("triptych.cache_store.{}.list", cache.ListBucket, cache.BucketListed)

# The cluster
MEMBERS = Bucket("members", cluster.Member, max_bytes=16 * _MB)
SCHEDULER_LIVES = Bucket("scheduler_lives", cluster.SchedulerLife, max_bytes=_MB)
PING = RequestSubject("triptych.ping.{}", cluster.Ping, failures.Acknowledged)
HEARTBEATS = EventSubject("triptych.heartbeat.{}", cluster.Heartbeat)

# What must exist before the first job: any process may prepare it, as often as it likes.
VIDEO_QUEUES = (VIDEO_JOBS,)
VIDEO_BUCKETS = (VIDEO_RECORDS, VIDEO_TIMELINES, MEMBERS, SCHEDULER_LIVES)
VIDEO_OBJECTS = (VIDEO_FILES,)

"""An instance's language engine without its transport: prompts in, tokens out.

``Engine`` joins the model (``common.models.causal_lm``), the books of its memory (``common.mempool``) and the policy
that makes its batches (``common.policies.language.continuous_batching``). Prefill and decode services put messages
around it.
"""

from common.engine.engine import Engine, RequestRefused
from common.engine.request import Finish, Output, Request

__all__ = ["Engine", "Finish", "Output", "Request", "RequestRefused"]

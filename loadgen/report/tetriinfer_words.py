"""The words between the tables. HTML is allowed in them."""

HEAD = (
    "Every number on this page comes from a discrete-event simulation: the policy classes of the live engines under "
    "virtual time, with a cost model fitted to the paper's own measurements. No GPU ran."
)
BURST = (
    "The paper's end-to-end test: everything at once, one prefill and one decode instance against one coupled engine "
    "with 16 slots (half the cards). <b>Resources</b> are the wall time that each instance is used, over the "
    "baseline's; <b>perf/$</b> is (1 + JCT reduction) over resources, which is what all five published rows are, and "
    "not the usual speed-up over cost that stands beside it. Means over seeds."
)
CURVES = (
    "Share of the requests whose first token was there within so many seconds, for the bursts. coupled-x2 has as many "
    "cards as TetriInfer. The 16 slots make the baseline's long tail."
)
PREFILL = (
    "Figure 16: 128 requests at once, no predictor's load. Sorting more prompts at a time helps the mean; the bound on"
    " overtaking grows with it. srf is ours (shortest remaining first, preempting between chunks); in a burst it is "
    "sjf with everything in one batch. The last row has the predictor beside the model: it costs a tenth of the "
    "throughput."
)
SERIES = (
    "Section 2 of the paper against the cost model: one pass each, no scheduling. Nine points in ten within a quarter "
    "is what the model is held to."
)
DISPATCH = (
    "Figure 19: 32 heavy decodes in all and 32 requests for each instance; seconds until the slowest is done. Of the "
    "readings of the ratio rule none spreads light ones (by a ratio alone, they all go where few are heavy), "
    "so that power_of_two here sends heavy ones by their ratio and light ones to the freest memory: then the slowest "
    "of four has 8 heavy and 24 light ones, as in the paper. Its 4.0 s on eight instances are not explained, and not "
    "aimed at."
)
RESERVE = (
    "Figure 18: 256 requests whose keys and values do not fit at once. The signs are the paper's, the gains smaller: "
    "who is thrown out is computed again by a pass that costs what its tokens cost, or swapped to the host and back, "
    "as the paper calls it, at the rate that vLLM's copies of single blocks were measured at (the paper gives none). "
    "On such cards swapping is the cheaper of the two. Were each of its copies to take twice as long, the dynamic rule "
    "would gain 10 % and the static one 4; no price gives both what they gain in the paper. A wrong prediction does "
    "not hurt here: most lower ends are 0 at either accuracy, and the paper says nothing about how its predictor errs. "
    "Longest leaves: who has most yet to come leaves first, by prediction, instead of who came last."
)
FLUID = (
    "fluid is ours: any instance may prefill, decode or do both, and each request goes where all requests together "
    "lose the least time, by predicted lengths (a running histogram, no trained model) and prefixes; prompts are "
    "preempted between chunks. Each row compares it with whichever other cluster has the best mean there, with as many"
    " cards or fewer; in brackets the 95 % interval over seeds (a trace has one run). Green: better; grey: within 1 % "
    "or the interval holds 1; red: worse. Only means are judged: shorter prompts first lets the longest wait, so that "
    "in bursts its p99 to the first token is up to a fifth later than the best coupled cluster's (in the tables "
    "below)."
)
FLIP = (
    "Four instances, two of each role; four minutes of long answers, then four of long prompts. Nobody is ever idle "
    "for a minute, so that the paper's rule does nothing; counting queueing time it takes one flip. fluid needs none."
)
ALL = (
    "The baselines with as many cards as TetriInfer (x2) are not in the paper. Where the 16 slots go, most of its lead"
    " goes with them."
)
STEADY = (
    "The paper's classes as Poisson processes on four instances; the paper has no such runs. A prefill instance's p99 "
    "and the decode instances' TPOT show what keeping the phases apart is for; the mean over requests shows what it "
    "costs."
)
TRACE = "Requests with the arrival times and lengths of the trace, on instances of the same kind."
METHOD = (
    "TTFT ends with prefill: the paper's does not hold the transfer. JCT is to the last token.",
    (
        "A chunk costs 8 ms beside its pass (144 ms for 512 tokens by figure 2): the steps in figures 11 to 16 are 150"
        " to 155 ms apart. All engines bear it. TetriInfer's chunks are padded, the predictor's load is 0.09 ms a "
        "prompt token during which chunks take 1.65 times as long."
    ),
    (
        "Lengths have the quantiles of the paper's figure 1 within each class, scaled to the mean prompt that follows "
        "from its number of chunks, and to mean answers that let the baseline end when the paper's did. Mixed has no "
        "prompt above 1,024 tokens, which fits what sorting gains in figure 16."
    ),
    (
        "The baseline takes at most 4096 prompt tokens a pass, beside its decodes: the paper's lets 3 to 5 heavy "
        "prompts in at once. Its version and settings are not published."
    ),
    (
        "A mixed pass costs its prompts and, for each decoding sequence, what it adds and reads; so chunks and decodes"
        " share the fixed cost of a pass, which favours coupled engines here as it does in figures 4c and 4d."
    ),
)

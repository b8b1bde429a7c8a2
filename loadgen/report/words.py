"""The words between the drawings. HTML is allowed in them."""

HEAD = (
    "Every number on this page comes from a discrete-event simulation: the live scheduler's policy classes "
    "under virtual time, with step and decode times from a profile. No GPU ran."
)
PAPER = (
    "Latency under ddit compared with another policy's. The body of the paper could not be read: beyond its "
    "two headline figures (p99 1.44×, mean 1.43×, which are −30.4 % and −30 %) the numbers come from other "
    "people's accounts of it, and rates, mixes and traces are partly guesses. In brackets: the static policy "
    "that was best at the point; below ours, its 95 % interval."
)
SWEEPS = (
    "Logarithmic; a line leaves the frame where its policy's queue runs away. Point at a name to bring it out "
    "with its 95 % interval, press it to hide it."
)
ELASTIC = (
    "Each cell is elastic's latency over that of whichever other policy is best at that very point: below 1 "
    "it is ahead of all of them. Green: better; grey: the 95 % interval holds 1; red: worse. Point at a cell "
    "for the figures."
)
STATIC = (
    "ddit over the best of sdop:1, sdop:2, sdop:4, spci and dpci at each point. It gains between light load "
    "and saturation. Past saturation every GPU-second counts: one GPU a video wastes none, and serving the "
    "hungry first lets new videos wait."
)
DISTRIBUTIONS = "Share of the videos that were done within so many seconds; all seeds together."
SLOTS = (
    "The same requests under three policies. A row is a GPU; the number is how many work together on the "
    "video; the master's decoding follows its steps on the same slot."
)
COST = (
    "The bound is the paper's dynamic programme (algorithm 1): every class has a block of GPUs and one degree "
    "of its own, the mix being known. For a burst it counts GPU-seconds; a policy is charged what its videos "
    "held or, as a bill would be, all GPUs until the last video is done. For Poisson arrivals the bound is "
    "the sum of block size times mean latency by M/D/c (only the waiting halved; with the whole halved, as "
    "reported, it falls below the service time), and a policy is charged its own mean latency of each class "
    "times the same block sizes. The plan may leave GPUs unused and isolates the classes, so a policy that "
    "shares all GPUs can be below 1. How the paper turns occupied time into money was not found."
)
METHOD = (
    (
        "Latency is from arrival to the stored file. Every policy meets the same requests, seed by seed; "
        "ratios are paired by seed (the geometric mean), and intervals are 95 %."
    ),
    (
        "Runs end when their last video does. Past saturation the queue grows with the length of the run, and "
        "latencies say who is ahead, not what a user would see in the long run."
    ),
    (
        "Square waves: Poisson arrivals whose rate jumps, a quarter of every 240 s at 1.5 of saturation, the rest at "
        "0.3; gentle: at 1.0 and 0.2. Burst: all videos at once."
    ),
    ("The rates named after the paper are for one server of 8 GPUs; 64 GPUs get eight times as many."),
)

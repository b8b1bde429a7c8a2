"""Virtual time for the video scheduler: the live scheduler's policy classes, driven by an event heap and a cost model.

Nothing here holds a scheduling rule. What a policy decides is carried out by ``loop``, at the prices of ``cost``.
"""

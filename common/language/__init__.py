"""A language instance: what prefill and decode processes have in common, which is everything but their role's name.

``serve`` is the process. Inside, ``instance`` answers messages, ``stepper`` runs ``common.engine`` in the compute
thread, ``handover`` and ``takeover`` move keys and values from a prefill instance to a decode instance, ``ahead`` and
``arriving`` those that leave while their prompt is still computed.
"""

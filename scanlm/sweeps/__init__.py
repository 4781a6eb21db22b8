"""Many runs in one YAML file.

``files`` reads a file and expands it into the values of each run; ``plans`` makes these into runs,
each with the command that does it alone, the place of its record and how far it is (one module a
kind: ``training_runs``, ``notebook_runs``, ``state_tracking_runs``); ``local`` carries runs out on
this machine, ``slurm`` hands them to a cluster as jobs (``slurm_job``) that ask for what a
``slurm_profile`` says. What runs knows nothing of who runs it.
"""

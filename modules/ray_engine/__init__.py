"""Scale-out: the worker's contract on Ray Serve replicas (`server.py --engine ray`).

    server (never imports ray) ──frames──▶ gateway.py, one for each model ──Serve handle──▶ replica.py, N of them
            └─ client.RayEngine ─ node.py: the local Ray, or our place in a cluster              └─frames─▶ modules.worker

gateway, node, replica and router run in the `ray` environment; a replica's own worker runs in its backend's environment.

settings  what --engine ray was told        launch   the variables of everything that speaks to Ray
reach     whether a cluster can be used     nodes    what each of its nodes must have
deploy    one model as a Serve application  routing  what the router remembers
"""

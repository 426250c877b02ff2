"""What works through the API on which loader: probes sent to a running server's own port.

`probes` holds the probes, `runner` runs them and keeps the results, `cli` is `server.py conformance`.
"""

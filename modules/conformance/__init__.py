"""What works through the API on which loader: probes sent to a running server's own port.

`probes` holds the probes (with the pictures of `squares`), `client` asks the server, `runner` runs them and keeps the results,
`cli` is `server.py conformance`.
"""

"""HTTP: the APIs of other products, the page's own, and what stands in front of both.

middleware, http_protocol        in front of everything: hosts, origins, sizes, deadlines
access                           who may call
body, errors, dialects           a request's JSON, and every failure in its protocol's words
turn, job, answer, sse           the seam: a protocol's body -> Turns -> generations -> an answer's parts, whole or streamed
foreign_fields, embeddings       what several protocols have in common
openai_*, responses*             OpenAI                   anthropic_*, ollama_*, kobold_*   theirs
llama_server_*, infill           llama-server             internal_*                        text-generation-webui
ui_*                             the page's routes        model_view   models and backends as they are shown
remotes, batch_lines             the saved servers; a line of a batch
health, metrics, docs_page, body_schema, examples, conformance_routes, splash
"""

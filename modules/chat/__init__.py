"""Conversations: templates, the store on disk, and the turns between a user and a model.

service          what the page asks for, saved first, then generated, then saved again
turns, vision    from a conversation's path to a prompt       attachments   the images of its messages
templates        the model's template, rendered by template_process
store            what a chat store is; places says which one it is
store_*          the store on SQLite and on PostgreSQL, with what both have in common
database, schema_sql, postgres, presence     what is below them
transfer, transcript, copying                conversations as JSON; as Markdown; from one store to another
"""

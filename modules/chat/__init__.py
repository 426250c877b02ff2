"""Conversations: templates, the store on disk, and the turns between a user and a model."""

"""Other servers as backends: the addresses the operator saved, the connection to one, and what is known of each now."""

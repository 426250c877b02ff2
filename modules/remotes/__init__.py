"""Other servers as backends: the addresses the operator saved, the connection to one, and what is known of each now.

store   the saved servers           address, connection   where a name may lead, and HTTP to it
watch   what is known of each now   listing               a server's model list, read with care
route   straight or by a proxy      cli                   server.py remote
"""

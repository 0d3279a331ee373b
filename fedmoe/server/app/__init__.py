"""The processes of a federation put together: storage, service, tokens, routes and upkeep; alone or as a replica."""

"""The coordinator's page: files for a browser, login, and the status of the federation as it changes."""

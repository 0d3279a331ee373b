"""What both HTTP servers need: deadlines, body limits, bearer tokens, cross-site checks."""

"""The operations whose speed decides what the platform costs; one folder an op, torch and triton only."""

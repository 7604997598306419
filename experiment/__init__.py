"""NANCY D3.4's experiment (Figures 24-27) on this host: budgets that size themselves, by both rules."""

"""Other people's models: their blocks recognised, swapped for ours, and put back."""

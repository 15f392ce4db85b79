"""Plan a run before anything is rented: the offers that fit a recipe, ranked by expected cost."""

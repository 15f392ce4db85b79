"""What a recipe takes on everything that is rented, ranked: before anything is paid."""

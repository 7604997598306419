"""The product's main job in two minutes: a guest's virtual CPU held by a reservation that sizes itself."""

def arm(): pass

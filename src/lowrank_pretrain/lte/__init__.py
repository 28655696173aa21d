"""LTE: heads that train on shares of the data and merge now and then."""

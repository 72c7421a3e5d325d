"""Methods, models, data sets, attacks and loggers of users."""

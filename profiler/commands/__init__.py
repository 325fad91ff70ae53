"""One module per subcommand, each with HELP, EXAMPLES, add_arguments(parser) and main(arguments)."""

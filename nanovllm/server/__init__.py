"""HTTP server: the OpenAI API and what belongs to it, over `AsyncLLM`. `nanovllm serve` starts it.

    app.py          make_app(service): the FastAPI application with its routers; `error_body` chooses the form of errors
    service.py      Service: the engine, the model's names, the limit of the queue, chat templates, the tokenizer
    settings.py     ServerSettings: the options of `nanovllm serve` that are not the engine's; options.py parses all
    middleware.py   around every request: id, API key, size of the body, trace, errors, access log
    http_protocol.py    what uvicorn reads from a connection: a limit of the head, no upgrade to HTTP/2
    exchange.py     Exchange: one request, as the access log shows it
    errors.py       ApiError, and `as_api_error`: which exception becomes which answer
    responses.py    `json_answer` and `stream_answer`, which end their work when the client leaves
    protocol/       bodies: requests are pydantic models (`ApiModel`), answers typed dictionaries; one file a family
    sampling.py     from the fields of a request to SamplingParams
    chat.py         ChatRun: the prompt of a conversation, its generation, and the parts of the message
    parsing.py      the protocol of parsers of reasoning and tool calls; parsers.py lists them by name
    reasoning.py, tool_parsers/, tool_choice.py    the parsers, and what a forced tool call must look like
    completions.py, chat_completions.py, responses_api.py, messages.py, models.py, tokenize.py, status.py, dev.py
                    endpoints, one file a family. Of the newer APIs, protocol/*_input.py makes a chat request of a
                    body, and protocol/*_output.py makes events and answers of what is new in the message

An endpoint is a coroutine on the router of its file, which `make_app` includes:

    @router.post(PATH)
    async def create_message(request: Request, body: MessagesRequest) -> Response:
        service, exchange = service_of(request), exchange_of(request)
        run = await ChatRun.start(service, exchange, chat_request, "msg", PATH)  # a ChatCompletionRequest
        return await stream_answer(request, events(run), describe_error)  # events: an async generator of bytes

Raise ApiError, or let InvalidArgumentError pass, for what is not allowed.
"""

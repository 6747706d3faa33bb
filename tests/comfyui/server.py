class PromptServer:
    def __init__(self, loop):
        self.routes = {}

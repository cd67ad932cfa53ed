"""The paper's tables, remade: many runs trained and measured side by side, and a page written from their figures."""

import { URLExt } from '@jupyterlab/coreutils';
import { ServerConnection } from '@jupyterlab/services';

/** Something that holds, or does not. */
export interface Fact {
  name: string;
  value: string;
  good: boolean | null; // null: neither
}

export interface Audit {
  summary: string;
  good: boolean;
  groups: { name: string; facts: Fact[] }[];
}

export interface Tier {
  tier: string;
  parameters: number;
  four_bit_bytes: number;
  memory_bytes: number;
  fits_this_machine: boolean;
}

export interface Ladder {
  size: string;
  available_bytes: number;
  tiers: Tier[];
}

export interface Vault {
  state: 'none' | 'locked' | 'open';
  provider: string;
  protects: string;
  asks: boolean; // a passphrase opens it
}

export interface Conversation {
  id: string;
  name: string;
  namespace: string;
  hours: number; // since it was written
  bytes: number;
}

export interface Kept {
  conversations: Conversation[];
  others: { objects: number; bytes: number };
}

export interface Check {
  files: string[];
  findings: { file: string; cell: number; place: string; kind: string; count: number }[];
  fingerprints: number | null;
  cures: string[];
}

/**
 * Ask the server. What a user typed goes in the body alone: addresses are logged.
 * @param name of the endpoint
 * @param body sent by POST; without it the question is a GET
 * @throws Error with a sentence to show
 */
export async function ask<T>(name: string, body?: object): Promise<T> {
  const settings = ServerConnection.makeSettings();
  const url = URLExt.join(settings.baseUrl, 'cloister', 'api', name);
  const request: RequestInit = body === undefined ? { cache: 'no-store' } : {
    method: 'POST', body: JSON.stringify(body), headers: { 'Content-Type': 'application/json' }
  };
  const response = await ServerConnection.makeRequest(url, request, settings);
  const answer = await response.json().catch(() => ({}));
  if (!response.ok) {
    throw new Error(answer.message ?? `The server refused it (${response.status}); load the page anew.`);
  }
  return answer as T;
}

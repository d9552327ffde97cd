"A stand-in of the Hugging Face hub: what huggingface_hub asks of it to make repositories, upload and download, in memory"
import base64, hashlib, json, re, threading
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlsplit

class Hub:
    "Repositories: name -> whether private, branches (name -> commit), and commits (hash -> name of a file -> bytes)"
    def __init__(self, writes=('writes',), reads=('reads',)):
        self.repos,self.blobs,self.asked,self.writes,self.reads,self.gated = {},{},[],writes,(*writes,*reads),set()
        self.lied = {} # sizes that are said and are not so

    def make(self, name, private=False):
        if name in self.repos: return False
        self.repos[name] = dict(private=private, branches={}, commits={})
        self.commit(name, 'main', {'.gitattributes':b'*.safetensors filter=lfs\n'})
        return True

    def commit(self, name, branch, files):
        repo = self.repos[name]
        text = json.dumps([len(repo['commits']), *((k, hashlib.sha256(v).hexdigest()) for k,v in sorted(files.items()))])
        repo['branches'][branch] = sha = hashlib.sha1(f'{name} {branch} {text}'.encode()).hexdigest()
        repo['commits'][sha] = files
        return sha

    def files(self, name, at='main'):
        repo = self.repos[name]
        return repo['commits'].get(repo['branches'].get(at, at))

    def tamper(self, name, file, data):
        "Another content of a file, in a commit of its own"
        return self.commit(name, 'main', {**self.files(name), file:data})

class Handler(BaseHTTPRequestHandler):
    protocol_version = 'HTTP/1.1'
    def log_message(self, *args): pass

    def say(self, status=200, data=b'', **headers):
        data = data if isinstance(data, bytes) else json.dumps(data).encode()
        self.send_response(status)
        for k,v in {'Content-Length':len(data), **{k.replace('_', '-'):v for k,v in headers.items()}}.items(): self.send_header(k, str(v))
        self.end_headers()
        if self.command!='HEAD': self.wfile.write(data)

    def no(self, status, code, why=''): self.say(status, {'error':why or code}, X_Error_Code=code, X_Error_Message=why or code)

    def body(self):
        if self.headers.get('Transfer-Encoding')!='chunked': return self.rfile.read(int(self.headers.get('Content-Length') or 0))
        parts = []
        while n := int(self.rfile.readline(), 16):
            parts.append(self.rfile.read(n))
            self.rfile.readline()
        self.rfile.readline()
        return b''.join(parts)

    def handle_any(self):
        hub,path,data = self.server.hub,unquote(urlsplit(self.path).path),self.body()
        token = (self.headers.get('Authorization') or ' ').split(' ')[1] or None
        hub.asked.append((self.command, path, token))
        if token and token not in hub.reads: return self.no(401, 'Unauthorized', 'Invalid credentials in Authorization header')
        for method,pattern,f in _routes:
            if self.command in method and (m := re.fullmatch(pattern, path)): return f(self, hub, token, data, **m.groupdict())
        self.no(404, 'NotFound', path)

    do_GET = do_HEAD = do_POST = do_PUT = handle_any

    def seen(self, hub, token, repo):
        "May this token see the repository? Says so where it may not"
        if repo in hub.repos and (token or not hub.repos[repo]['private']): return True
        self.no(404 if token else 401, 'RepoNotFound', 'Repository not found')

    def may(self, hub, token, repo):
        "May it write there?"
        if not token: return self.no(401, 'Unauthorized', 'Invalid username or password.')
        if token not in hub.writes: return self.no(403, 'Forbidden', 'You do not have the rights to write')
        return repo is None or self.seen(hub, token, repo)

def create(self, hub, token, data):
    o = json.loads(data)
    name = f"{o['organization']}/{o['name']}"
    if not self.may(hub, token, None): return
    there = dict(url=f'http://{self.headers["Host"]}/{name}', name=name)
    new = hub.make(name, o.get('visibility')=='private' or o.get('private', False))
    if not new: return self.say(409, there, X_Error_Message='You already created it')
    self.say(data=there)

def validate(self, hub, token, data):
    ok = re.match(r'---\n.*?\n---\n', json.loads(data)['content'], re.S)
    self.say(200 if ok else 400, dict(errors=[] if ok else [dict(message='no YAML')], warnings=[]))

def info(self, hub, token, data, repo, at=None):
    if not self.seen(hub, token, repo): return
    if hub.files(repo, at or 'main') is None: return self.no(404, 'RevisionNotFound')
    o = hub.repos[repo]
    self.say(data=dict(id=repo, modelId=repo, sha=o['branches'].get(at or 'main', at), private=o['private'], tags=[], downloads=0, likes=0,
        siblings=[dict(rfilename=k) for k in hub.files(repo, at or 'main')]))

def tree(self, hub, token, data, repo, at):
    if not self.seen(hub, token, repo): return
    if (files := hub.files(repo, at)) is None: return self.no(404, 'RevisionNotFound')
    self.say(data=[dict(type='file', path=k, size=len(v), oid=hashlib.sha1(v).hexdigest()) for k,v in files.items()])

def branch(self, hub, token, data, repo, at):
    if not self.may(hub, token, repo): return
    o = hub.repos[repo]
    if at in o['branches']: return self.no(409, 'Conflict', 'Reference already exists')
    o['branches'][at] = o['branches']['main']
    self.say(data={})

def preupload(self, hub, token, data, repo, at):
    if not self.may(hub, token, repo): return
    self.say(data=dict(files=[dict(path=o, uploadMode='lfs' if o.endswith('.safetensors') else 'regular', shouldIgnore=False)
        for o in (f['path'] for f in json.loads(data)['files'])]))

def batch(self, hub, token, data, repo):
    if not self.may(hub, token, repo): return
    def there(o): return {} if o['oid'] in hub.blobs else \
        dict(actions=dict(upload=dict(href=f'http://{self.headers["Host"]}/lfs/{o["oid"]}')))
    self.say(data=dict(transfer='basic', objects=[dict(oid=o['oid'], size=o['size'], **there(o)) for o in json.loads(data)['objects']]))

def put(self, hub, token, data, oid):
    if hashlib.sha256(data).hexdigest()!=oid: return self.no(400, 'BadHash')
    hub.blobs[oid] = data
    self.say()

def commit(self, hub, token, data, repo, at):
    if not self.may(hub, token, repo): return
    files = dict(hub.files(repo, at) or {})
    for o in map(json.loads, data.decode().splitlines()):
        k,v = o['key'],o['value']
        if k=='file': files[v['path']] = base64.b64decode(v['content'])
        elif k=='lfsFile': files[v['path']] = hub.blobs[v['oid']]
        elif k=='deletedFile': del files[v['path']]
    sha = hub.commit(repo, at, files)
    self.say(data=dict(commitUrl=f'http://{self.headers["Host"]}/{repo}/commit/{sha}', commitOid=sha, success=True))

def resolve(self, hub, token, data, repo, at, file):
    if not self.seen(hub, token, repo): return
    if repo in hub.gated: return self.no(403, 'GatedRepo', 'You must accept the conditions')
    if (files := hub.files(repo, at)) is None: return self.no(404, 'RevisionNotFound')
    sha = hub.repos[repo]['branches'].get(at, at)
    if file not in files: return self.say(404, {}, X_Error_Code='EntryNotFound', X_Repo_Commit=sha)
    v = files[file]
    size = {'X_Linked_Size':hub.lied[file]} if file in hub.lied else {}
    self.say(200, v, X_Repo_Commit=sha, ETag=f'"{hashlib.sha256(v).hexdigest()}"', **size)

_name = r'(?P<repo>[^/]+/[^/]+)'
_routes = [(m, p, f) for m,p,f in (
    ('POST', '/api/repos/create', create), ('POST', '/api/validate-yaml', validate), ('GET', f'/api/models/{_name}', info),
    ('GET', f'/api/models/{_name}/revision/(?P<at>.+)', info), ('GET', f'/api/models/{_name}/tree/(?P<at>.+)', tree),
    ('POST', f'/api/models/{_name}/branch/(?P<at>.+)', branch), ('POST', f'/api/models/{_name}/preupload/(?P<at>.+)', preupload),
    ('POST', f'/{_name}.git/info/lfs/objects/batch', batch), ('PUT', '/lfs/(?P<oid>[0-9a-f]+)', put),
    ('POST', f'/api/models/{_name}/commit/(?P<at>.+)', commit), (('GET','HEAD'), f'/{_name}/resolve/(?P<at>[^/]+)/(?P<file>.+)', resolve))]

@contextmanager
def serve(hub):
    "The hub's address, as long as it is up"
    server = ThreadingHTTPServer(('127.0.0.1',0), Handler)
    server.hub,server.daemon_threads = hub,True
    thread = threading.Thread(target=server.serve_forever, kwargs=dict(poll_interval=.05), daemon=True)
    thread.start()
    try: yield f'http://127.0.0.1:{server.server_port}'
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
